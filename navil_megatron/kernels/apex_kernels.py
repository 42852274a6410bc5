"""NVIDIA Apex: weight gradients added to their FP32 sum inside the product, and whether it is really there."""

import ctypes
from dataclasses import replace
from importlib.util import find_spec

from torch import Tensor

from navil_megatron.config.errors import UserError
from navil_megatron.layers.kernels import Kernels

FUSION_MODULE = "fused_weight_gradient_mlp_cuda"
"""The extension with ``wgrad_gemm_accum_fp32``, which adds a weight gradient to its FP32 sum inside the product."""
CORE_MODULE = "amp_C"
"""The extension that every CUDA build of Apex has; it tells NVIDIA Apex from the web toolkit of that name."""
INSTALL = "pip install --no-build-isolation git+https://github.com/NVIDIA/apex with APEX_CUDA_EXT=1 (docs/hopper.md)"


def with_apex(kernels: Kernels) -> Kernels:
    """The kernels with what Apex does better.

    Raises:
        UserError: says what of Apex is absent or why it does not load.
    """
    require_apex()
    import fused_weight_gradient_mlp_cuda  # a CUDA extension

    def add_weight_gradient(total: Tensor, grad_output: Tensor, rows: Tensor) -> None:
        fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(rows.contiguous(), grad_output.contiguous(), total)

    return replace(kernels, add_weight_gradient=add_weight_gradient)


def require_apex() -> None:
    """Nothing, if the extensions are built and load beside this torch.

    Raises:
        UserError: says which is absent or why it does not load.
    """
    for module in (CORE_MODULE, FUSION_MODULE):
        problem = extension_problem(module)
        if problem is not None:
            raise UserError(
                f'runtime.gradient_accumulation_fusion = "apex", but {problem}; {INSTALL}, or set it to "none"'
            )


def extension_problem(module: str) -> str | None:
    """What keeps an extension module of Apex from loading; ``None`` if nothing does."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return f"NVIDIA Apex's {module} is not installed"
    try:
        ctypes.CDLL(spec.origin)
    except OSError as error:
        return f"NVIDIA Apex's {module} does not load: {' '.join(str(error).split())}"
    return None
