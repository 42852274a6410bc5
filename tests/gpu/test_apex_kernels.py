"""Apex's sum of weight gradients against torch's: nearer to FP32, since no product is rounded to BF16 on the way."""

import pytest
import torch

from navil_megatron.kernels.apex_kernels import with_apex
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS

pytestmark = pytest.mark.gpu


def test_weight_gradients_are_summed_in_fp32() -> None:
    pytest.importorskip("fused_weight_gradient_mlp_cuda", reason="NVIDIA Apex is not installed")
    generator = torch.Generator("cuda").manual_seed(0)
    grad = torch.randn(256, 96, device="cuda", generator=generator).bfloat16()
    rows = torch.randn(256, 64, device="cuda", generator=generator).bfloat16()
    start = torch.randn(96, 64, device="cuda", generator=generator)
    exact = start.double() + grad.double().t() @ rows.double()
    errors = []
    for kernels in (with_apex(TORCH_KERNELS), TORCH_KERNELS):
        total = start.clone()
        kernels.add_weight_gradient(total, grad, rows)
        errors.append((total - exact).norm() / exact.norm())
    assert errors[0] <= 1e-5
    assert errors[0] < errors[1]
