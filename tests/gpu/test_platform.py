"""runtime/platform.py on a GPU: the config's ``cuda`` is the device that computes and the memory that is counted."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Pair:
    """What an upload takes: pinned, and not."""

    pinned: torch.Tensor
    other: torch.Tensor


@pytest.mark.gpu
def test_uploads_arrive_whole_behind_slow_work_and_do_not_share_memory() -> None:
    platform = Platform.from_config(RuntimeConfig(device="cuda"), local_rank=0)
    heavy = torch.ones(4096, 4096, device=platform.device)
    found = []
    for number in range(16):
        numbers = torch.arange(1 << 20) + number
        take = platform.upload(Pair(numbers.pin_memory(), (numbers % 7).to(torch.int32)))
        for _ in range(10):
            heavy = heavy @ heavy * 1e-4
        pair = take()
        assert pair.pinned.device == pair.other.device == platform.device
        found.append((pair.pinned.sum(), pair.other.sum(dtype=torch.int64)))
    for number, (total, other) in enumerate(found):
        numbers = torch.arange(1 << 20) + number
        assert (int(total), int(other)) == (int(numbers.sum()), int((numbers % 7).sum()))
