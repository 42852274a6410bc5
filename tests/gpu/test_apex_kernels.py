"""Sums of weight gradients in FP32, torch's and Apex's: no product is rounded to BF16 on the way."""

import pytest
import torch

from navil_megatron.kernels.apex_kernels import with_apex
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("library", ["torch", "apex"])
def test_weight_gradients_are_summed_in_fp32(library: str) -> None:
    kernels = TORCH_KERNELS
    if library == "apex":
        pytest.importorskip("fused_weight_gradient_mlp_cuda", reason="NVIDIA Apex is not installed")
        kernels = with_apex(kernels)
    generator = torch.Generator("cuda").manual_seed(0)
    grad = torch.randn(256, 96, device="cuda", generator=generator).bfloat16()
    rows = torch.randn(256, 64, device="cuda", generator=generator).bfloat16()
    total = torch.randn(96, 64, device="cuda", generator=generator)
    exact = total.double() + grad.double().t() @ rows.double()
    rounded = total + grad.t() @ rows
    kernels.add_weight_gradient(total, grad, rows)
    error, error_of_rounded = ((found - exact).norm() / exact.norm() for found in (total, rounded))
    assert error <= 1e-5 < error_of_rounded
