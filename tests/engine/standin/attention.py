"""cuDNN's attention of packed rows ([t, n, d], ``thd``), forward and backward, and which it would take."""

from itertools import pairwise

import torch

from tests.engine.standin.calls import exported
from tests.engine.standin.enums import (
    DType,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)

_CAUSAL = (NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK, NVTE_Mask_Type.NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK)
_LARGEST_HEAD = 256


@exported
def get_fused_attn_backend(fused_attn_params):
    """cuDNN for BF16 of packed rows; otherwise none, and why."""
    asked = fused_attn_params
    heads = (asked.head_dim_qk, asked.head_dim_v)
    reasons = {
        "types other than BF16 and FP16": asked.qkv_dtype not in (DType.kBFloat16, DType.kFloat16),
        f"heads of {heads}": any(size % 8 or size > _LARGEST_HEAD for size in heads),
        "layouts other than thd": asked.qkv_layout != NVTE_QKV_Layout.NVTE_THD_THD_THD,
        "packed rows without a padding mask": "PADDING" not in NVTE_Mask_Type(int(asked.attn_mask_type)).name,
        "a bias": asked.bias_type != NVTE_Bias_Type.NVTE_NO_BIAS,
        "another softmax": asked.softmax_type != NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX,
        "dropout": asked.dropout != 0,
        "a window": asked.window_size_left != -1,
    }
    refused = [reason for reason, holds in reasons.items() if holds]
    if refused:
        return NVTE_Fused_Attn_Backend.NVTE_No_Backend, f"the stand-in has no {', '.join(refused)}"
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def _segments(cu_seqlens: torch.Tensor, padded: torch.Tensor | None, num_rows: int, longest: int) -> list[slice]:
    """The rows of each segment, which fill all rows and are no longer than what the kernel was told."""
    for name, bounds in (("cu_seqlens", cu_seqlens), ("cu_seqlens_padded", padded)):
        if bounds is not None and bounds.dtype != torch.int32:
            raise RuntimeError(f"{name} is {bounds.dtype}, expected int32")
    ends = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(ends)]
    starts = ends if padded is None else padded.tolist()
    if starts[0] != 0 or starts[-1] != num_rows or min(lengths) < 0:
        raise RuntimeError(f"cu_seqlens {starts} do not bound {num_rows} rows")
    if max(lengths) > longest:
        raise RuntimeError(f"a segment of {max(lengths)} rows, but max_seqlen is {longest}")
    return [slice(start, start + length) for start, length in zip(starts[:-1], lengths, strict=True)]


def _attend(q, k, v, scale, causal, rows):
    """[t, n, d] of each in FP32 -> [t, n, d]; rows of no segment give zeros."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    pieces = []
    for segment in rows:
        query, key, value = (x[segment].transpose(0, 1) for x in (q, k, v))
        repeats = q.shape[1] // k.shape[1]
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
        scores = query @ key.transpose(1, 2) * scale
        if causal:
            length = scores.shape[-1]
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        pieces.append((scores.softmax(-1) @ value).transpose(0, 1))
    if not pieces:
        return out
    index = torch.cat([torch.arange(segment.start, segment.stop) for segment in rows])
    return out.index_copy(0, index, torch.cat(pieces))


def _check(layout, bias_type, mask, softmax, dropout, window, bottom_right, tensors):
    q, k, v = tensors[:3]
    if layout != NVTE_QKV_Layout.NVTE_THD_THD_THD:
        raise NotImplementedError(f"attention of {layout.name}")
    if bias_type != NVTE_Bias_Type.NVTE_NO_BIAS or softmax != NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX or dropout:
        raise NotImplementedError("attention with a bias, another softmax or dropout")
    if "PADDING" not in mask.name:
        raise RuntimeError(f"packed rows take a padding mask, found {mask.name}")
    if tuple(window) not in ((-1, -1), (-1, 0)):
        raise NotImplementedError(f"attention in a window {window}")
    if {x.dtype for x in tensors} - {torch.bfloat16} and {x.dtype for x in tensors} - {torch.float16}:
        raise RuntimeError(f"attention takes one type, BF16 or FP16, found {sorted({str(x.dtype) for x in tensors})}")
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1] or q.shape[0] != k.shape[0]:
        raise RuntimeError(f"attention of {tuple(q.shape)} on {tuple(k.shape)} and {tuple(v.shape)}")


@exported
def fused_attn_fwd(
    max_seqlen_q,
    max_seqlen_kv,
    is_training,
    attn_scale,
    p_dropout,
    set_zero,
    qkv_layout,
    o_format,
    qkv_scale_inv_format,
    bias_type,
    attn_mask_type,
    softmax_type,
    window_size,
    bottom_right_diagonal,
    cu_seqlens_q,
    cu_seqlens_kv,
    Q,
    K,
    V,
    fake_dtype,
    cu_seqlens_q_padded,
    cu_seqlens_kv_padded,
    page_table_k,
    page_table_v,
    s_quantizer,
    o_quantizer,
    Bias,
    SoftmaxOffset,
    rng_gen,
    rng_elts_per_thread,
    return_max_logit,
    cuda_graph,
    /,
):
    """The context [t, n, d], what backward needs of the softmax [t, n, 1], and the random state [2]."""
    tensors = (Q, K, V)
    _check(qkv_layout, bias_type, attn_mask_type, softmax_type, p_dropout, window_size, bottom_right_diagonal, tensors)
    if s_quantizer is not None or o_quantizer is not None or page_table_k is not None or return_max_logit:
        raise NotImplementedError("attention in FP8, of pages, or with its largest logit")
    if o_format != NVTE_QKV_Format.NVTE_THD:
        raise NotImplementedError(f"a context in {o_format.name}")
    if not torch.equal(cu_seqlens_q, cu_seqlens_kv) or max_seqlen_q != max_seqlen_kv:
        raise NotImplementedError("attention on other segments than its own")
    rows = _segments(cu_seqlens_q, cu_seqlens_q_padded, Q.shape[0], max_seqlen_q)
    with torch.no_grad():
        q, k, v = (x.detach().float() for x in tensors)
        context = _attend(q, k, v, attn_scale, attn_mask_type in _CAUSAL, rows).to(Q.dtype)
    return [context, torch.full((*Q.shape[:2], 1), torch.nan), torch.zeros(2, dtype=torch.int64)]


@exported
def fused_attn_bwd(
    max_seqlen_q,
    max_seqlen_kv,
    attn_scale,
    p_dropout,
    set_zero,
    qkv_layout,
    o_format,
    do_format,
    dqkv_layout,
    qkv_scale_inv_format,
    do_scale_inv_format,
    bias_type,
    attn_mask_type,
    softmax_type,
    window_size,
    bottom_right_diagonal,
    deterministic,
    cu_seqlens_q,
    cu_seqlens_kv,
    Q,
    K,
    V,
    O,  # noqa: E741 # their name
    dO,
    fake_dtype,
    Aux_CTX_Tensors,
    cu_seqlens_q_padded,
    cu_seqlens_kv_padded,
    s_quantizer,
    dp_quantizer,
    dqkv_quantizer,
    cuda_graph,
    /,
):
    """Gradients of query, key and value; none of a bias and of a softmax offset."""
    tensors = (Q, K, V, O, dO)
    _check(qkv_layout, bias_type, attn_mask_type, softmax_type, p_dropout, window_size, bottom_right_diagonal, tensors)
    if dqkv_quantizer is not None:
        raise NotImplementedError("attention in FP8")
    if len(Aux_CTX_Tensors) != 2 or Aux_CTX_Tensors[0].shape != (*Q.shape[:2], 1):
        raise RuntimeError("attention's backward was not given what its forward saved")
    rows = _segments(cu_seqlens_q, cu_seqlens_q_padded, Q.shape[0], max_seqlen_q)
    with torch.enable_grad():
        leaves = [x.detach().float().requires_grad_() for x in (Q, K, V)]
        context = _attend(*leaves, attn_scale, attn_mask_type in _CAUSAL, rows)
        gradients = torch.autograd.grad(context, leaves, dO.detach().float().view(context.shape))
    return [*(gradient.to(Q.dtype) for gradient in gradients), None, None]
