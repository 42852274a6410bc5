"""Torch's own kernels: what they ask of a GPU, seen on tensors that pretend to lie on one."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from tests.operators import Operators


def test_a_weights_gradient_is_added_inside_one_product_on_a_gpu() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        with FakeTensorMode(), torch.device("cuda"), Operators() as seen:
            total = torch.empty(6, 8)
            grad, rows = torch.empty(5, 6, dtype=dtype), torch.empty(5, 8, dtype=dtype)
            seen.names.clear()
            TORCH_KERNELS.add_weight_gradient(total, grad, rows)
        assert [name for name in seen.names if name not in ("t", "device")] in (["addmm"], ["addmm_"])
