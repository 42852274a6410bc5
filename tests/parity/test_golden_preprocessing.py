"""Our image plan, token layout and pixels against the authors' preprocessing (golden/preprocess)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from navil_megatron.blueprint.image_plan import (
    ImagePlanner,
    ImageSizeError,
    ScalePlan,
    count_image_tokens,
    image_grid_thw,
    image_token_ids,
    image_token_layout,
)
from navil_megatron.config.model import SPECIAL_TOKENS
from navil_megatron.data.dali_decode import DaliDecoder
from navil_megatron.data.image_decode import DecodeJob, ImageDecoder, PillowDecoder, read_image_size
from navil_megatron.models.vision_encoder import normalise
from tests.tolerances import DALI_PIXELS

PATCH, MERGE = 16, 2
MAX_PIXELS = 2**26


def build_planner(min_patches: int, max_patches: int, multi_scale: bool, share_shrunk_limit: bool) -> ImagePlanner:
    return ImagePlanner(
        patch_size=PATCH,
        merge_size=MERGE,
        min_pixels=min_patches * PATCH**2,
        max_pixels=max_patches * PATCH**2,
        multi_scale=multi_scale,
        scale_ratio=0.7071,
        share_shrunk_limit=share_shrunk_limit,
    )


@pytest.fixture(scope="module")
def preprocess(golden_dir: Path) -> Path:
    return golden_dir / "public" / "preprocess"


@pytest.fixture(scope="module")
def cases(preprocess: Path) -> list[dict]:
    return json.loads((preprocess / "cases.json").read_text())["cases"]


def plan_case(preprocess: Path, case: dict) -> tuple[list[bytes], tuple[tuple[ScalePlan, ...], ...]]:
    files = [(preprocess / "images" / name).read_bytes() for name in case["images"]]
    planner = build_planner(case["min_patches"], case["max_patches"], case["multi_scale"], share_shrunk_limit=True)
    return files, planner.plan_images([read_image_size(file, MAX_PIXELS) for file in files])


def joined(layout: list[tuple[str, int]]) -> list[str]:
    return [token for token, run in layout for _ in range(run)]


def test_every_grid_vector(preprocess: Path) -> None:
    vectors = json.loads((preprocess / "grid_vectors.json").read_text())["vectors"]
    assert len(vectors) == 375
    for width, height, min_patches, max_patches, multi_scale, expected in vectors:
        planner = build_planner(min_patches, max_patches, bool(multi_scale), share_shrunk_limit=False)
        grids = image_grid_thw(planner.plan_images([(height, width)]))
        assert grids.tolist() == expected, (width, height, min_patches, max_patches, multi_scale)


def test_grids_layouts_and_counts_of_every_case(preprocess: Path, cases: list[dict]) -> None:
    for case in cases:
        _, images = plan_case(preprocess, case)
        assert image_grid_thw(images).tolist() == case["image_grid_thw"], case["id"]
        assert [len(scales) for scales in images] == case["num_scales"], case["id"]
        assert sum(scale.num_patches for scales in images for scale in scales) == case["num_patches"]
        layout = [token for scales in images for token in joined(image_token_layout(scales, MERGE))]
        golden = [run for run in case["token_layout"] if run[0] != "text"]  # the prompt's newline between images
        assert layout == joined(golden), case["id"]
        counts = [count_image_tokens(scales, MERGE) for scales in images]
        assert sum(text + visual for text, visual in counts) == case["num_image_tokens_total"]
        assert sum(visual for _, visual in counts) == case["num_img_context"] + len(images)
        if "resized_hw_before_padding" in case:
            sizes = [[scale.resized_height, scale.resized_width] for scales in images for scale in scales]
            assert sizes == case["resized_hw_before_padding"], case["id"]


def test_ids_follow_the_layout(preprocess: Path, cases: list[dict]) -> None:
    ids = [700, 3, 41, 9, 8, 77, 6, 5, 4, 1000, 11, 2]  # shuffled and with gaps, as a real tokenizer may have them
    for case in cases:
        for scales in plan_case(preprocess, case)[1]:
            names = [SPECIAL_TOKENS[ids.index(i)] for i in image_token_ids(scales, MERGE, ids)]
            assert names == joined(image_token_layout(scales, MERGE))


def test_without_the_shared_limit_each_image_is_planned_alone(preprocess: Path, cases: list[dict]) -> None:
    several = [case for case in cases if len(case["images"]) > 1 and case["multi_scale"]]
    assert several
    for case in several:
        files = [(preprocess / "images" / name).read_bytes() for name in case["images"]]
        sizes = [read_image_size(file, MAX_PIXELS) for file in files]
        planner = build_planner(case["min_patches"], case["max_patches"], True, share_shrunk_limit=False)
        together = planner.plan_images(sizes)
        assert image_grid_thw(together).tolist() == case["if_each_image_were_processed_alone"]["image_grid_thw"]
        assert together == tuple(planner.plan_images([size])[0] for size in sizes)


def decode_case(decoder: ImageDecoder, preprocess: Path, case: dict) -> np.ndarray:
    """[p, 3 * patch * patch] uint8 of all images of a case."""
    files, images = plan_case(preprocess, case)
    jobs = [
        DecodeJob(file, read_image_size(file, MAX_PIXELS), scales, (True,) * len(scales))
        for file, scales in zip(files, images, strict=True)
    ]
    return torch.cat([patches for scales in decoder.decode(jobs) for patches in scales]).numpy()


def test_pixels_of_every_case_are_exact(preprocess: Path, cases: list[dict]) -> None:
    golden = load_file(preprocess / "pixels.safetensors")
    for case in cases:
        patches = decode_case(PillowDecoder(PATCH, MERGE, MAX_PIXELS), preprocess, case)
        name = case["id"]
        assert patches.dtype == np.uint8 and patches.shape == (case["num_patches"], 3 * PATCH**2)
        assert np.array_equal(patches.astype(np.int64).sum(axis=1), golden[f"{name}/patch_sums"]), name
        stored = golden[f"{name}/u8"].reshape(-1, 3 * PATCH**2)
        assert np.array_equal(patches[golden.get(f"{name}/index", slice(None))], stored), name
        values = normalise(torch.from_numpy(patches)).numpy()
        assert values.dtype == np.float32
        assert np.array_equal(values, golden["lut"][patches])
        assert hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest() == case["sha256_float32"], name


def test_pixels_by_dali_are_within_two_steps(preprocess: Path, cases: list[dict]) -> None:
    golden = load_file(preprocess / "pixels.safetensors")
    decoder = DaliDecoder(PATCH, MERGE, MAX_PIXELS, device=torch.device("cpu"), num_threads=1)
    for case in cases:
        patches, name = decode_case(decoder, preprocess, case), case["id"]
        assert patches.shape == (case["num_patches"], 3 * PATCH**2)
        stored = golden[f"{name}/u8"].reshape(-1, 3 * PATCH**2)
        difference = patches[golden.get(f"{name}/index", slice(None))].astype(int) - stored
        assert np.abs(difference).max() <= DALI_PIXELS, name


def test_an_aspect_ratio_beyond_200_is_refused() -> None:
    planner = build_planner(256, 4096, True, share_shrunk_limit=False)
    assert planner.plan_images([(20, 4000)])
    with pytest.raises(ImageSizeError, match="20 x 4001 pixels has an aspect ratio beyond 200"):
        planner.plan_images([(20, 4001)])
