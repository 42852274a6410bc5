"""runtime/platform.py on a GPU: the config's ``cuda`` is the device that computes and the memory that is counted."""

import pytest
import torch

from navil_megatron.config.runtime import RuntimeConfig
from navil_megatron.runtime.platform import Platform


@pytest.mark.gpu
def test_cuda_platform_computes_and_counts_memory() -> None:
    platform = Platform.from_config(RuntimeConfig(device="cuda"), local_rank=0)
    ones = torch.ones(256, 256, device=platform.device)
    product = ones @ ones
    platform.synchronize()
    assert product.device == platform.device
    assert product.unique().tolist() == [256.0]
    assert platform.peak_memory_bytes() >= 2 * ones.nbytes
