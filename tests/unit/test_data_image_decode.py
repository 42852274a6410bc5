"""Both decoders against each other over sizes, kinds and orientations, and against files that are none or lie."""

import io
import struct
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from random import Random
from types import GetSetDescriptorType

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from navil_megatron.blueprint.image_plan import ImagePlanner, ScalePlan
from navil_megatron.config.errors import UserError
from navil_megatron.config.load import load_config
from navil_megatron.data.choose_decoder import build_image_decoder
from navil_megatron.data.dali_decode import DaliDecoder, resize
from navil_megatron.data.image_decode import (
    DecodeJob,
    ImageDecodeError,
    ImageDecoder,
    PillowDecoder,
    blank_patches,
    decode_image,
    read_image_size,
)
from navil_megatron.models.vision_encoder import normalise
from tests.tolerances import DALI_PIXELS
from tests.unit.config_examples import EXAMPLE_TOML

PATCH, MERGE, MAX_PIXELS = 16, 2, 2**20
PLANNER = ImagePlanner(
    patch_size=PATCH, merge_size=MERGE, min_pixels=48**2, max_pixels=160**2, multi_scale=True, scale_ratio=0.7071
)
CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Blocks of noise: hard edges, where bicubic interpolation overshoots, and flat places."""
    small = RNG.integers(0, 256, (-(-height // 4), -(-width // 4), channels), dtype=np.uint8)
    return small.repeat(4, 0).repeat(4, 1)[:height, :width]


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def job_of(file: bytes, size: tuple[int, int] | None = None) -> DecodeJob:
    size = size or read_image_size(file, MAX_PIXELS)
    (scales,) = PLANNER.plan_images([size])
    return DecodeJob(file, size, scales, (True,) * len(scales))


def reason(result: list[torch.Tensor] | ImageDecodeError) -> str | None:
    return str(result) if isinstance(result, ImageDecodeError) else None


@pytest.fixture(scope="module")
def pillow() -> ImageDecoder:
    return PillowDecoder(PATCH, MERGE, MAX_PIXELS)


@pytest.fixture(scope="module")
def dali() -> ImageDecoder:
    return DaliDecoder(PATCH, MERGE, MAX_PIXELS, device=CPU, num_threads=2)


@pytest.fixture(params=["pillow", "dali"])
def decoder(request: pytest.FixtureRequest) -> ImageDecoder:
    return request.getfixturevalue(request.param)


def assert_near(pillow: ImageDecoder, dali: ImageDecoder, files: list[bytes]) -> None:
    jobs = [job_of(file) for file in files]
    for job, exact, near in zip(jobs, pillow.decode(jobs), dali.decode(jobs), strict=True):
        assert isinstance(exact, list) and isinstance(near, list)
        for scale, expected, found in zip(job.scales, exact, near, strict=True):
            assert expected.shape == found.shape == (scale.num_patches, 3 * PATCH**2)
            assert expected.dtype == found.dtype == torch.uint8
            assert (expected.int() - found.int()).abs().max() <= DALI_PIXELS, (job.size, scale)


def test_dali_is_near_pillow_at_any_size(pillow: ImageDecoder, dali: ImageDecoder) -> None:
    random = Random(0)
    sizes = [(random.randint(2, 400), random.randint(2, 400)) for _ in range(40)]
    sizes += [(1, 1), (1, 90), (90, 1), (300, 40), (40, 300), (96, 96), (48, 48), (1000, 990)]
    assert_near(pillow, dali, [saved(Image.fromarray(pixels(*size)), "PNG") for size in sizes])


def test_dali_is_near_pillow_for_every_kind(pillow: ImageDecoder, dali: ImageDecoder) -> None:
    image = Image.fromarray(pixels(75, 130))
    alpha = Image.fromarray(pixels(75, 130, 4))
    files = [saved(image.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")]
    files += [saved(alpha, kind) for kind in ("PNG", "WEBP", "TIFF")]
    files += [saved(image, kind) for kind in ("WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")]
    files += [saved(image.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")]
    files += [
        saved(image, "JPEG", progressive=True),
        saved(image, "JPEG", subsampling=0),
        saved(image, "JPEG", quality=5),
    ]
    files += [saved(image, "WEBP", lossless=True), saved(image.convert("1"), "TIFF")]
    files += [saved(image, kind, save_all=True, append_images=[image.rotate(180)]) for kind in ("PNG", "GIF", "WEBP")]
    assert_near(pillow, dali, files)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation(pillow: ImageDecoder, dali: ImageDecoder, kind: str) -> None:
    image = Image.fromarray(pixels(60, 90))
    files = [saved(image, kind, exif=exif(orientation)) for orientation in range(1, 9)]
    sizes = [read_image_size(file, MAX_PIXELS) for file in files]
    assert sizes == [(60, 90)] * 4 + [(90, 60)] * 4
    assert sizes == [decode_image(file, MAX_PIXELS).size[::-1] for file in files]
    assert_near(pillow, dali, files)


def test_sixteen_bits(pillow: ImageDecoder, dali: ImageDecoder) -> None:
    grey = pixels(64, 64, 1)[..., 0]
    job = job_of(saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"))
    (plain,) = pillow.decode([job_of(saved(Image.fromarray(grey), "PNG"))])
    (found,) = dali.decode([job])  # Pillow itself clips to white
    assert isinstance(plain, list) and isinstance(found, list)
    assert (plain[-1].int() - found[-1].int()).abs().max() <= DALI_PIXELS


def test_only_wanted_scales_are_made(decoder: ImageDecoder) -> None:
    job = job_of(saved(Image.fromarray(pixels(160, 160)), "JPEG"))
    assert len(job.scales) > 2
    (everything,) = decoder.decode([job])
    (some,) = decoder.decode([replace(job, wanted=(True, *(False,) * (len(job.scales) - 2), True))])
    assert isinstance(everything, list) and isinstance(some, list) and len(some) == 2
    assert torch.equal(some[0], everything[0]) and torch.equal(some[1], everything[-1])
    assert decoder.decode([replace(job, wanted=(False,) * len(job.scales))]) == [[]]


@pytest.mark.parametrize("size", [(31, 47), (150, 40), (60, 300)])
def test_the_arithmetic_of_a_gpu_gives_the_pixels_of_the_cpu(size: tuple[int, int]) -> None:
    picture = torch.from_numpy(pixels(*size)).permute(2, 0, 1)[None]
    for factor in (0.3, 0.8, 2.5):
        scale = ScalePlan(round(size[0] * factor), round(size[1] * factor), 0, 0)
        whole, real = resize(picture, scale), resize(picture.float(), scale)
        assert real.dtype == torch.float32 and torch.equal(real, real.round())
        assert (whole.int() - real.int()).abs().max() <= DALI_PIXELS


def forged_png(height: int, width: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))[:-5])]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def hostile() -> dict[str, tuple[bytes, tuple[int, int], str]]:
    """Name -> file, promised size, expected reason."""
    image = Image.fromarray(pixels(64, 96))
    jpeg, png = saved(image, "JPEG"), saved(image, "PNG")
    size, other = (64, 96), "size differs from the index"
    unreadable, damaged = "not a readable image file", "damaged image data"
    return {
        "empty": (b"", size, "empty file"),
        "garbage": (RNG.bytes(4000), size, unreadable),
        "html": (b"<!DOCTYPE html><html><body>404</body></html>", size, unreadable),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="96" height="64"/>', size, unreadable),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], size, damaged),
        "truncated png": (png[: len(png) // 2], size, damaged),
        "truncated webp": (saved(image, "WEBP")[:300], size, unreadable),
        "truncated avif": (saved(image, "AVIF")[:-200], size, damaged),
        "forged": (forged_png(60_000, 60_000), size, f"more than {MAX_PIXELS} pixels"),
        "bomb": (saved(Image.new("1", (5000, 5000)), "PNG"), (5000, 5000), f"more than {MAX_PIXELS} pixels"),
        "forged to fit": (forged_png(64, 96), size, damaged),
        "of another size": (jpeg, (64, 95), other),
        "not turned": (jpeg, (96, 64), other),
    }


def test_every_bad_file_gives_its_reason_and_spoils_no_other(decoder: ImageDecoder) -> None:
    good = saved(Image.fromarray(pixels(70, 50)), "JPEG")
    (alone,) = decoder.decode([job_of(good)])
    bad = hostile()
    jobs = [job for file, size, _ in bad.values() for job in (job_of(good), job_of(file, size))]
    results = decoder.decode(jobs)
    assert {name: reason(result) for name, result in zip(bad, results[1::2], strict=True)} == {
        name: expected for name, (_, _, expected) in bad.items()
    }
    for result in results[::2]:
        assert isinstance(result, list) and isinstance(alone, list)
        assert all(torch.equal(a, b) for a, b in zip(result, alone, strict=True))


def test_a_corrupt_scan_decodes_to_something(pillow: ImageDecoder, dali: ImageDecoder) -> None:
    file = bytearray(saved(Image.fromarray(pixels(200, 200)), "JPEG"))
    middle = len(file) // 2
    file[middle : middle + 20] = bytes(range(100, 120))
    job = job_of(bytes(file))
    for result in (*pillow.decode([job]), *dali.decode([job])):
        assert isinstance(result, list) and len(result) == len(job.scales)


def test_many_decodes_with_bad_ones_keep_their_memory(decoder: ImageDecoder) -> None:
    bad = list(hostile().values())
    good = [saved(Image.fromarray(pixels(100 + n, 130)), "JPEG") for n in range(16)]
    process = psutil.Process()
    grown = []
    for number in range(40):
        file, size, expected = bad[number % len(bad)]
        batch = [job_of(good[(number + n) % len(good)]) for n in range(4)]
        results = decoder.decode([*batch[:2], job_of(file, size), *batch[2:]])
        assert [reason(result) for result in results] == [None, None, expected, None, None]
        if number in (20, 39):
            grown.append(process.memory_info().rss)
    assert grown[1] - grown[0] < 32 * 2**20


def test_several_threads_share_a_decoder(decoder: ImageDecoder) -> None:
    files = [saved(Image.fromarray(pixels(90 + n, 120)), "JPEG") for n in range(6)] + [b"nothing"]
    jobs = [job_of(file, None if file != b"nothing" else (64, 64)) for file in files]
    expected = decoder.decode(jobs)
    found: dict[int, list] = {}

    def work(number: int) -> None:
        for _ in range(5):
            found[number] = decoder.decode(jobs)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for results in found.values():
        for a, b in zip(results, expected, strict=True):
            assert reason(a) == reason(b)
            assert isinstance(b, ImageDecodeError) or all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_this_torch_names_the_stream_that_dali_is_given() -> None:
    """Without a GPU no stream can be made; make test-versions asks the lowest torch and the newest."""
    assert isinstance(torch.Stream.native_handle, GetSetDescriptorType)


def test_a_run_with_pillow_needs_no_dali(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(EXAMPLE_TOML)
    config = load_config(path, [])
    assert isinstance(build_image_decoder(config), PillowDecoder)
    built = build_image_decoder(replace(config, data=replace(config.data, image_decoder="dali")))
    assert isinstance(built, DaliDecoder) and built.device == CPU


def test_absent_dali_is_one_line_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.toml"
    path.write_text(EXAMPLE_TOML)
    config = load_config(path, [])
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # how Python notes that a module is not to be found
    with pytest.raises(UserError, match="needs the package nvidia-dali-cuda130, which is not installed"):
        build_image_decoder(replace(config, data=replace(config.data, image_decoder="dali")))


def test_blank_and_normalise() -> None:
    blank = blank_patches(ScalePlan(30, 40, 2, 4), PATCH)
    assert blank.shape == (8, 3 * PATCH**2) and blank.unique().tolist() == [127]
    every = torch.arange(256, dtype=torch.uint8)
    expected = (every.numpy().astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    assert np.array_equal(normalise(every).numpy(), expected)
    assert every.tolist() == list(range(256))
