"""Linear layers that hold one weight per modality and split it over the tensor-parallel ranks.

Rows arrive modality-major, so each modality is one GEMM on a contiguous view. The collectives are those of
megatron-core's own column and row parallel layers and run once for both modalities, whatever the microbatch holds: a
modality without rows leaves a zero gradient, never none, and no rank waits for another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import divide
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work

from navil_megatron.layers.collectives import all_gather_single, reduce_scatter_single
from navil_megatron.layers.modality import NaViLPackedSeqParams


class ModalityProduct(Protocol):
    """Text rows through one matrix and visual rows through another; the kernel provider may supply it.

    Takes rows [t, in], or this rank's share of them under sequence parallelism, and gives [t, out]; ``group`` None: no
    collective.
    """

    def __call__(
        self,
        rows: Tensor,
        text: nn.Module,
        visual: nn.Module,
        num_text: int,
        group: ProcessGroup | None,
        sequence_parallel: bool,
    ) -> Tensor:
        """[t, out]."""
        ...


class _ModalityMatmul(torch.autograd.Function):
    """y[:n] = x[:n] W_text^T and y[n:] = x[n:] W_visual^T, with the tensor-parallel collectives of a column layer.

    Where there are biases, b_text and b_visual are added to their rows inside the same GEMM.

    Under sequence parallelism x is this rank's share: it is gathered, not kept, and gathered again in the backward pass
    while the input gradient is computed; that gradient is reduced while the weight gradients are. ``group`` None: no
    collective at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_text: Tensor,
        weight_visual: Tensor,
        bias_text: Tensor | None,
        bias_visual: Tensor | None,
        num_text: int,
        group: ProcessGroup | None,
        sequence_parallel: bool,
    ) -> Tensor:
        """x [t, in] or this rank's share of it, weights [out, in], biases [out] -> [t, out]."""
        ctx.save_for_backward(x, weight_text, weight_visual)
        ctx.num_text, ctx.group, ctx.sequence_parallel = num_text, group, sequence_parallel
        if group is not None and sequence_parallel:
            x, _ = _start_gather(x, group, async_op=False)
        return _matmul_by_modality(x, weight_text.t(), weight_visual.t(), num_text, bias_text, bias_visual)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of both weights and of both biases, where they are wanted."""
        x, weight_text, weight_visual = ctx.saved_tensors
        num_text, group = ctx.num_text, ctx.group
        needs_input, needs_text, needs_visual, needs_bias_text, needs_bias_visual = ctx.needs_input_grad[:5]
        grad_output = grad_output.contiguous()
        gathering = None
        if ctx.sequence_parallel and (needs_text or needs_visual):
            x, gathering = _start_gather(x, group, async_op=True)
        grad_input, reducing = None, None
        if needs_input:
            grad_input = _matmul_by_modality(grad_output, weight_text, weight_visual, num_text)
            if group is not None:
                grad_input, reducing = _start_reduce(grad_input, group, ctx.sequence_parallel)
        if gathering is not None:
            gathering.wait()
        grad_text = grad_output[:num_text].t() @ x[:num_text] if needs_text else None
        grad_visual = grad_output[num_text:].t() @ x[num_text:] if needs_visual else None
        grad_bias_text = grad_output[:num_text].sum(0) if needs_bias_text else None
        grad_bias_visual = grad_output[num_text:].sum(0) if needs_bias_visual else None
        if reducing is not None:
            reducing.wait()
        return grad_input, grad_text, grad_visual, grad_bias_text, grad_bias_visual, None, None, None


def _matmul_by_modality(
    x: Tensor,
    right_text: Tensor,
    right_visual: Tensor,
    num_text: int,
    bias_text: Tensor | None = None,
    bias_visual: Tensor | None = None,
) -> Tensor:
    """[t, in] and two [in, out] -> [t, out], without a copy of either half."""
    output = x.new_empty(x.shape[0], right_text.shape[1])
    for rows, right, bias in (
        (slice(None, num_text), right_text, bias_text),
        (slice(num_text, None), right_visual, bias_visual),
    ):
        if bias is None:
            torch.mm(x[rows], right, out=output[rows])
        else:
            torch.addmm(bias, x[rows], right, out=output[rows])
    return output


def _start_gather(x: Tensor, group: ProcessGroup, *, async_op: bool) -> tuple[Tensor, Work | None]:
    output = x.new_empty(x.shape[0] * group.size(), x.shape[1])
    work = all_gather_single(output, x.contiguous(), group=group, async_op=async_op)
    return output, work


def _start_reduce(grad: Tensor, group: ProcessGroup, sequence_parallel: bool) -> tuple[Tensor, Work | None]:
    if not sequence_parallel:
        return grad, torch.distributed.all_reduce(grad, group=group, async_op=True)
    share = grad.new_empty(grad.shape[0] // group.size(), grad.shape[1])
    return share, reduce_scatter_single(share, grad, group=group, async_op=True)


def modality_product(
    rows: Tensor, text: nn.Module, visual: nn.Module, num_text: int, group: ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """The product in plain torch, written into one output by both modalities."""
    output: Tensor = _ModalityMatmul.apply(
        rows, text.weight, visual.weight, text.bias, visual.bias, num_text, group, sequence_parallel
    )
    return output


@dataclass(frozen=True)
class LinearKernels:
    """How matrices are held and multiplied: what varies between kernel libraries."""

    linear: Callable[..., nn.Module]
    """Built with (input size, output size, bias=, dtype=); holds ``weight`` [out, in] and, if asked for, ``bias``."""
    product: ModalityProduct = modality_product
    """Multiplies the rows of both modalities."""
    shared: bool = False
    """Both modalities go through one matrix, which then has two names."""


class ModalityLinear(MegatronModule):
    """What the two parallel kinds share: a matrix per modality, split along one dimension.

    Args:
        config: Supplies the parameter type and the sequence-parallel switch.
        kernels: Hold and multiply the matrices. Each is a module of its own, so that freezing and checkpoints name it
            ``<layer>.<modality>``.
        output_size: Rows of the whole matrix.
        input_size: Columns of the whole matrix.
        tp_group: Tensor-parallel ranks.
        partition_stride: Blocks of the output that are split each on its own (2 for [gate; up]).
        bias: A bias per modality, split like the rows; only where the output is split.
    """

    partition_dim: ClassVar[int]
    """0 splits the output, 1 the input."""

    def __init__(
        self,
        config: ModelParallelConfig,
        kernels: LinearKernels,
        output_size: int,
        input_size: int,
        tp_group: ProcessGroup,
        partition_stride: int = 1,
        bias: bool = False,
    ):
        super().__init__(config=config)
        self.product = kernels.product
        self.tp_group = tp_group
        if self.partition_dim == 0:
            output_size = divide(output_size, tp_group.size())
        else:
            input_size = divide(input_size, tp_group.size())
        build = partial(kernels.linear, input_size, output_size, bias=bias, dtype=config.params_dtype)
        self.text = build()
        self.visual = self.text if kernels.shared else build()
        for parameter in self.parameters():
            set_tensor_model_parallel_attributes(
                parameter, is_parallel=True, dim=self.partition_dim, stride=partition_stride
            )


class ModalityColumnParallelLinear(ModalityLinear):
    """[t/tp, 1, in] under sequence parallelism, else [t, 1, in] -> [t, 1, out/tp], rows in modality-major order."""

    partition_dim = 0

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Project each token with its modality's matrix."""
        output = self.product(
            hidden_states.flatten(0, 1),
            self.text,
            self.visual,
            packed_seq_params.num_text_tokens,
            self.tp_group if self.tp_group.size() > 1 else None,
            self.config.sequence_parallel,
        )
        return output.unsqueeze(1)


class ModalityRowParallelLinear(ModalityLinear):
    """[t, 1, in/tp] -> [t/tp, 1, out] under sequence parallelism, else [t, 1, out], rows in modality-major order."""

    partition_dim = 1

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Project each token with its modality's matrix and sum over the ranks."""
        num_text = packed_seq_params.num_text_tokens
        partial = self.product(hidden_states.flatten(0, 1), self.text, self.visual, num_text, None, False)
        return reduce_over_tensor_parallel(partial.unsqueeze(1), self.config, self.tp_group)


class ComposedRowParallelLinear(ModalityRowParallelLinear):
    """Output projection of the released 2B model: text rows get W_text x, visual rows W_visual (W_text x).

    Reference behaviour of InternLM2VE, which differs from the paper's equation. W_visual acts on the summed output, so
    each rank holds it whole and applies it to the visual rows of its own share. Such a share may end anywhere, which
    no FP8 product takes, so W_visual is multiplied in plain torch.
    """

    def __init__(
        self,
        config: ModelParallelConfig,
        kernels: LinearKernels,
        output_size: int,
        input_size: int,
        tp_group: ProcessGroup,
    ):
        super().__init__(config, kernels, output_size, input_size, tp_group)
        self.visual = nn.Linear(output_size, output_size, bias=False, dtype=config.params_dtype)
        self.visual.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Project all tokens with the text matrix, then the visual ones again."""
        partial = self.text(hidden_states)
        output = reduce_over_tensor_parallel(partial, self.config, self.tp_group)
        ranks = self.tp_group.size() if self.config.sequence_parallel else 1
        num_text = packed_seq_params.local_num_text_tokens(self.tp_group.rank() if ranks > 1 else 0, ranks)
        return torch.cat([output[:num_text], self.visual(output[num_text:])])


def reduce_over_tensor_parallel(partial: Tensor, config: ModelParallelConfig, tp_group: ProcessGroup) -> Tensor:
    """Sum the ranks' partial outputs: reduce-scatter along the rows under sequence parallelism, else all-reduce."""
    if config.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(partial, group=tp_group)
    return reduce_from_tensor_model_parallel_region(partial, group=tp_group)
