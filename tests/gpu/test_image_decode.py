"""DALI on a GPU: the CPU's pixels within 2/255, bad files alone, memory and order of streams; images a second."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from navil_megatron.blueprint.image_plan import ImagePlanner
from navil_megatron.data.dali_decode import DaliDecoder
from navil_megatron.data.image_decode import DecodeJob, ImageDecodeError
from navil_megatron.models.vision_encoder import normalise
from tests.tolerances import DALI_PIXELS

PATCH, MERGE, MAX_PIXELS = 16, 2, 2**24
PLANNER = ImagePlanner(
    patch_size=PATCH, merge_size=MERGE, min_pixels=256**2, max_pixels=1024**2, multi_scale=True, scale_ratio=0.7071
)


def photo(height: int, width: int, seed: int, kind: str = "JPEG") -> bytes:
    """Smooth shapes with some grain."""
    random = np.random.default_rng(seed)
    base = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = random.normal(0, 6, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray((np.asarray(base) + grain).clip(0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def job_of(file: bytes, size: tuple[int, int]) -> DecodeJob:
    (scales,) = PLANNER.plan_images([size])
    return DecodeJob(file, size, scales, (True,) * len(scales))


@pytest.fixture(scope="module")
def jobs() -> list[DecodeJob]:
    sizes = [(600, 500), (1000, 1000), (300, 1200), (1900, 700), (40, 60), (2000, 2000)]
    kinds = ["JPEG", "JPEG", "PNG", "JPEG", "WEBP", "JPEG"]
    files = [job_of(photo(*size, n, kind), size) for n, (size, kind) in enumerate(zip(sizes, kinds, strict=True))]
    return [*files, job_of(photo(500, 500, 9, "GIF"), (500, 500)), job_of(b"no image", (64, 64)),
            job_of(photo(600, 600, 10)[:9000], (600, 600))]  # fmt: skip


def decoder_on(device: torch.device) -> DaliDecoder:
    return DaliDecoder(PATCH, MERGE, MAX_PIXELS, device=device, num_threads=4)


@pytest.mark.gpu
def test_pixels_of_the_gpu_are_the_cpus(jobs: list[DecodeJob]) -> None:
    device = torch.empty(0, device="cuda").device
    on_gpu, on_cpu = decoder_on(device).decode(jobs), decoder_on(torch.device("cpu")).decode(jobs)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        if isinstance(theirs, ImageDecodeError):
            assert str(ours) == str(theirs)
            continue
        assert isinstance(ours, list)
        for found, expected in zip(ours, theirs, strict=True):
            assert found.device == expected.device and found.dtype == torch.uint8
            assert (found.cpu().int() - expected.int()).abs().max() <= DALI_PIXELS


@pytest.mark.gpu
def test_pixels_are_normalised_to_the_bits_of_the_cpu() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(normalise(every.cuda()).cpu(), normalise(every))


@pytest.mark.gpu
def test_a_busy_stream_does_not_change_the_pixels(jobs: list[DecodeJob]) -> None:
    """Batches queue up behind slow work, so that memory which DALI reuses too early would show."""
    decoder = decoder_on(torch.empty(0, device="cuda").device)
    good = [job for job, result in zip(jobs, decoder.decode(jobs), strict=True) if isinstance(result, list)]
    expected = [patches.cpu() for scales in decoder.decode(good) for patches in scales]
    heavy = torch.ones(4096, 4096, device="cuda")
    found = []
    for _ in range(8):
        for _ in range(20):
            heavy = heavy @ heavy * 1e-4
        found.append([patches for scales in decoder.decode(good) for patches in scales])
    for batch in found:
        assert all(torch.equal(a.cpu(), b) for a, b in zip(batch, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("side", [550, 1000, 2000])
def test_images_a_second(side: int) -> None:
    decoder = decoder_on(torch.empty(0, device="cuda").device)
    jobs = [job_of(photo(side, side, seed), (side, side)) for seed in range(32)]
    for _ in range(2):
        started = time.perf_counter()
        results = decoder.decode(jobs)
        torch.accelerator.synchronize()
        seconds = time.perf_counter() - started
    assert all(isinstance(result, list) for result in results)
    print(f"{side}x{side}: {len(jobs) / seconds:.0f} images/s")
