"""torch's own variable-length flash attention: all segments of a row in one call, in BF16 on a GPU."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from navil_megatron.config.errors import UserError
from navil_megatron.kernels import torch_kernels

GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""How grouped queries are asked for: torch 2.11 takes them as they come, later ones say so."""


def require_flash_attention() -> None:
    """Nothing, if this torch was built with flash attention.

    Raises:
        UserError: It was not, and says what to do.
    """
    # A build without CUDA is no place for a run on a GPU, and is refused where the device is.
    if torch.version.cuda is not None and not torch.backends.cuda.is_flash_attention_available():
        raise UserError(
            f'runtime.kernels = "torch" in BF16 needs flash attention, and torch {torch.__version__} was built without '
            'it; install a build that has it, or set runtime.kernels = "transformer_engine" or precision.type = "fp32"'
        )


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, *, groups: Any, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> Tensor:
    """See ``layers.kernels``; heads of a multiple of 8 channels, 256 at most."""
    if query.shape[0] == 0:
        return torch_kernels.segment_attention(
            query, key, value, groups=groups, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, causal=causal
        )
    # A window as long as the longest segment hides nothing. Without one, torch 2.14 and newer prefer cuDNN, which plans
    # anew for every number of segments and every longest one, and so for nearly every microbatch.
    window = (-1, 0) if causal else (max_seqlen, max_seqlen)
    grouped = GROUPED if query.shape[1] != key.shape[1] else {}
    context = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=window, **grouped
    )
    assert isinstance(context, Tensor)  # nothing else is asked for
    return context.flatten(1)
