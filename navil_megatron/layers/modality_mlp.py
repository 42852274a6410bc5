"""SwiGLU feed-forward with one expert per modality, for expert parallel size 1 (paper, section 3.2.2)."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from navil_megatron.layers.kernels import Kernels
from navil_megatron.layers.modality import NaViLPackedSeqParams
from navil_megatron.layers.modality_linear import ModalityColumnParallelLinear, ModalityRowParallelLinear


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2f] -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu_gradient(gate_up: Tensor, grad_output: Tensor) -> Tensor:
    """[..., 2f] and [..., f] -> [..., 2f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad = torch.empty_like(gate_up)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.mul(grad_output, torch.nn.functional.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=grad_gate)
    return grad


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up for [gate | up] along the last dimension; keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """[..., 2f] -> [..., f]."""
        ctx.save_for_backward(gate_up)
        return swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        """[..., f] -> [..., 2f]."""
        (gate_up,) = ctx.saved_tensors
        return swiglu_gradient(gate_up, grad_output)


class ModalityMLP(MegatronModule):
    """[t/tp, 1, h] or [t, 1, h] -> the same, rows in modality-major order."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        kernels: Kernels,
        shared: bool = False,
        **_: Any,
    ):
        super().__init__(config=config)
        width = config.ffn_hidden_size
        self.linear_fc1 = ModalityColumnParallelLinear(
            config, kernels, 2 * width, config.hidden_size, pg_collection.tp, partition_stride=2, shared=shared
        )
        self.linear_fc2 = ModalityRowParallelLinear(
            config, kernels, config.hidden_size, width, pg_collection.tp, shared=shared
        )

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Each token through its modality's expert."""
        gate_up = self.linear_fc1(hidden_states, packed_seq_params)
        return self.linear_fc2(SwiGLU.apply(gate_up), packed_seq_params)
