"""Plain torch, for CPU and GPU, with no kernel library."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from navil_megatron.kernels.adamw import AdamW
from navil_megatron.kernels.attention_heads import attention_heads, attention_heads_gradient
from navil_megatron.kernels.modality_product import modality_product
from navil_megatron.layers.kernels import Kernels


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


def swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """See ``layers.kernels``."""
    gate, up = gate_up.chunk(2, dim=-1)
    output = nn.functional.silu(gate).mul_(up)
    return output if weights is None else output.mul_(weights.unsqueeze(-1))


def swiglu_gradient(grad_output: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See ``layers.kernels``."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad = torch.empty_like(gate_up)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    factor = grad_output if weights is None else grad_output * weights.unsqueeze(-1)
    activated = nn.functional.silu(gate)
    torch.mul(factor, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(factor * up, gate, grad_input=grad_gate)
    return grad, None if weights is None else activated.mul_(up).mul_(grad_output).sum(-1)


def grouped_product(holder: nn.Module, rows: Tensor, ends: Tensor) -> Tensor:
    """See ``layers.kernels``."""
    weight = holder.get_parameter("weight")
    if len(weight) == 1 or not len(rows):
        return nn.functional.linear(rows, weight[0])
    return nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def add_weight_gradient(total: Tensor, grad_output: Tensor, rows: Tensor) -> None:
    """See ``layers.kernels``: one product, which adds in float32, but for BF16 on a CPU, which has no such product."""
    if total.dtype == grad_output.dtype:
        total.addmm_(grad_output.t(), rows)
    elif total.device.type == "cpu":
        total += grad_output.t() @ rows
    else:
        torch.addmm(total, grad_output.t(), rows, out_dtype=total.dtype, out=total)


TORCH_KERNELS = Kernels(
    norms={"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm},
    attention_heads=attention_heads,
    attention_heads_gradient=attention_heads_gradient,
    segment_attention=segment_attention,
    linear=Linear,
    modality_product=partial(partial, modality_product),
    swiglu=swiglu,
    swiglu_gradient=swiglu_gradient,
    grouped_product=partial(partial, grouped_product),
    add_weight_gradient=add_weight_gradient,
    recompute=partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
    encoder_precision=nullcontext,
    encoder_rows=1,
    adam=AdamW,
)
