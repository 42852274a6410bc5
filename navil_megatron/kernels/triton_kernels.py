"""On a GPU: what is neither a product nor attention, each in one kernel of Triton's, under either library."""

from dataclasses import replace
from importlib.util import find_spec

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.layers.kernels import Kernels


def with_triton(kernels: Kernels) -> Kernels:
    """The kernels with what takes one pass over the memory instead of several.

    Raises:
        UserError: Triton is not installed.
    """
    if find_spec("triton") is None:
        raise UserError(
            'runtime.device = "cuda" needs Triton, which torch for CUDA brings along and which is not installed; '
            f"install torch {torch.__version__} anew with what it depends on"
        )
    from navil_megatron.kernels import triton_attention_heads, triton_swiglu  # cannot be loaded without it

    return replace(
        kernels,
        attention_heads=triton_attention_heads.attention_heads,
        attention_heads_gradient=triton_attention_heads.attention_heads_gradient,
        swiglu=triton_swiglu.swiglu,
        swiglu_gradient=triton_swiglu.swiglu_gradient,
    )
