"""Plain torch, for CPU and GPU, with no kernel library."""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from navil_megatron.kernels.adamw import AdamW
from navil_megatron.kernels.modality_product import modality_product
from navil_megatron.layers.kernels import Kernels


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension that allows sequence parallelism, which core's torch norm refuses.

    Under sequence parallelism each rank sees its own rows, so the weight's gradient is summed over the tensor-parallel
    ranks: core does so for parameters marked ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """[..., in] -> [..., out]. Starts empty: ``models.build`` fills every weight by its own seed."""

    def reset_parameters(self) -> None:
        """Nothing: random numbers for billions of weights would be thrown away."""


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, *, groups: Any, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> Tensor:
    """See ``layers.kernels``: one dense call per distinct segment length."""
    num_heads, num_groups, dtype = query.shape[1], key.shape[1], query.dtype
    if query.device.type == "cpu":
        # On a CPU the backward pass of bf16 attention takes several times as long as that of fp32.
        query, key, value = query.float(), key.float(), value.float()
    outputs = []
    for group in groups:
        shape = (group.num_segments, group.length)
        q, k, v = (x[group.start : group.end].unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=num_groups != num_heads)
        outputs.append(out.transpose(1, 2).reshape(-1, num_heads * query.shape[2]))
    if not outputs:
        # No token at all. The sum keeps the empty result attached to the graph, so every weight gets a zero gradient.
        key, value = (x.repeat_interleave(num_heads // num_groups, dim=1) for x in (key, value))
        return (query + key + value).flatten(1).to(dtype)
    return torch.cat(outputs).to(dtype)


TORCH_KERNELS = Kernels(
    rms_norm=RMSNorm,
    segment_attention=segment_attention,
    linear=Linear,
    modality_product=modality_product,
    encoder_norms={"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm},
    encoder_precision=nullcontext,
    encoder_rows=1,
    adam=AdamW,
)
