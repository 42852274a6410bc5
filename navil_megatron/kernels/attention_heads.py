"""Query, key and value out of the fused projection: in attention order, normed head by head, turned by position.

Computed in float32 and rounded once, by formulas of which a compiler makes one kernel each way.
"""

import torch
from torch import Tensor

from navil_megatron.layers.kernels import FusedHeads, HeadNorms


def attention_heads(
    qkv: Tensor, fused: FusedHeads, order: Tensor | None, rotary: Tensor, norms: HeadNorms | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``layers.kernels``."""
    query, key, value = (_rows(part, order) for part in qkv.split(fused.sizes, fused.dim))
    turned = []
    for number, heads in enumerate((query, key)):
        if norms is not None:
            heads = heads * _inverse_root(heads, norms.epsilon)
            heads *= _weight_of_rows(norms.weights[number], norms.is_visual)
        turned.append(_turned(heads, rotary[:, 0], rotary[:, 1]).to(qkv.dtype).flatten(1, 2))
    return turned[0], turned[1], value.flatten(1, 2).contiguous()


def attention_heads_gradient(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor | None,
    fused: FusedHeads,
    inverse: Tensor | None,
    rotary: Tensor,
    norms: HeadNorms | None,
) -> tuple[Tensor, Tensor | None]:
    """See ``layers.kernels``; everything in the order of the projection's rows."""
    rotary = _rows(rotary, inverse)
    given = [_rows(grad, inverse).unflatten(1, fused.shape(part)) for part, grad in enumerate(grads)]
    parts, grad_weights = [], []
    for number, grad in enumerate(given[:2]):
        values = _turned(grad, rotary[:, 0], -rotary[:, 1])
        if norms is not None and qkv is not None:
            is_visual = None if norms.is_visual is None else _rows(norms.is_visual, inverse)
            heads = qkv.split(fused.sizes, fused.dim)[number]
            inverse_root = _inverse_root(heads, norms.epsilon)
            normed = heads * inverse_root
            products = values * normed
            grad_weights.append(_weight_gradient(products, is_visual))
            weight = _weight_of_rows(norms.weights[number], is_visual)
            mean = (products * weight).mean(-1, keepdim=True)
            values = (values * weight).addcmul_(normed, mean, value=-1).mul_(inverse_root)
        parts.append(values.to(grad.dtype))
    of_weights = torch.stack(grad_weights).to(norms.weights.dtype) if norms is not None else None
    return torch.cat([*parts, given[2]], dim=fused.dim), of_weights


def _rows(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows.index_select(0, order)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels (i, i + d/2) of heads [t, ., ., d], by cosines and sines [t, d/2]."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.cat([(first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)], dim=-1)


def _inverse_root(heads: Tensor, epsilon: float) -> Tensor:
    """One over the root of the mean square of each head. [t, ., ., d] -> [t, ., ., 1]."""
    norm = torch.linalg.vector_norm(heads, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm.square() / heads.shape[-1] + epsilon).rsqrt()


def _weight_of_rows(weight: Tensor, is_visual: Tensor | None) -> Tensor:
    """[2, d] of text and visual and [t] -> [t, 1, 1, d]; [1, d] of both -> [1, 1, 1, d]. float32."""
    rows = weight if is_visual is None else torch.where(is_visual.unsqueeze(1), weight[1], weight[0])
    return rows.float()[:, None, None]


def _weight_gradient(products: Tensor, is_visual: Tensor | None) -> Tensor:
    """[t, ., ., d] -> the sums of each modality's rows, [2, d], or of all rows, [1, d]."""
    rows = products.sum((1, 2))
    if is_visual is None:
        return rows.sum(0, keepdim=True)
    return torch.stack([torch.where(mask.unsqueeze(1), rows, 0).sum(0) for mask in (~is_visual, is_visual)])
