"""The exported processor against the authors' preprocessing: grids, pixels, token layouts and prompts."""

import hashlib
import json
import re
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from navil_megatron.blueprint.chat_template import (
    AUTHORS_SYSTEM_MESSAGE,
    chat_template,
    default_system_message,
)
from navil_megatron.blueprint.image_plan import ImagePlanner
from navil_megatron.hf.remote_code.processing_navil_chat import NaViLImageProcessor, NaViLProcessor, image_tokens
from tests.unit.hf_examples import tiny_model, tiny_tokenizer

TEMPLATES = [("internlm2-chat", "internlm2"), ("Hermes-2", "internlm2"), ("qwen3-chat", "qwen3")]
"""The authors' templates and a family whose models use it."""


def processor_of(**settings: Any) -> NaViLImageProcessor:
    """A processor for bounds in patches."""
    minimum, maximum = settings.pop("min_patches") * 256, settings.pop("max_patches") * 256
    return NaViLImageProcessor(min_pixels=minimum, max_pixels=maximum, **settings)


def runs(text: str) -> list[list[Any]]:
    """A string as the golden files write it: [token, run length] and ["text", string]."""
    pieces = groupby(re.findall(r"<[^>]+>|[^<]+", text))
    return [[token, len(list(run))] if token.startswith("<") else ["text", token] for token, run in pieces]


def test_every_preprocessing_case(golden_dir: Path) -> None:
    folder = golden_dir / "public" / "preprocess"
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    pixels = load_file(folder / "pixels.safetensors")
    exact = 0
    for case in cases:
        settings = {name: case[name] for name in ("min_patches", "max_patches", "multi_scale")}
        processor = processor_of(**settings, share_shrunk_limit=True)
        features = processor.preprocess([Image.open(folder / "images" / name) for name in case["images"]])
        grids, num_scales = features["image_grid_thw"], features["num_scales"].tolist()
        assert grids.tolist() == case["image_grid_thw"], case["id"]
        assert num_scales == case["num_scales"], case["id"]
        layout = "\n".join(image_tokens(part.tolist(), 2) for part in grids.split(num_scales))
        assert runs(layout) == case["token_layout"], case["id"]
        values = features["pixel_values"].numpy()
        exact += hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest() == case["sha256_float32"]
        counts = np.rint((values.astype(np.float64) + 1) * 127.5).astype(np.int64)
        kept = pixels.get(f"{case['id']}/index", np.arange(len(counts)))
        difference = np.abs(counts[kept] - pixels[f"{case['id']}/u8"].astype(np.int64))
        assert difference.max() <= 1, case["id"]  # Pillow versions may round a bicubic sample differently
    assert len(cases) == 75
    assert exact >= 0.9 * len(cases)


def test_each_image_alone(golden_dir: Path) -> None:
    folder = golden_dir / "public" / "preprocess"
    for case in json.loads((folder / "cases.json").read_text())["cases"]:
        if "if_each_image_were_processed_alone" not in case:
            continue
        settings = {name: case[name] for name in ("min_patches", "max_patches", "multi_scale")}
        features = processor_of(**settings).preprocess(
            [Image.open(folder / "images" / name) for name in case["images"]]
        )
        assert features["image_grid_thw"].tolist() == case["if_each_image_were_processed_alone"]["image_grid_thw"]


def test_grid_vectors_and_the_planner_of_the_training_data(golden_dir: Path) -> None:
    vectors = json.loads((golden_dir / "public" / "preprocess" / "grid_vectors.json").read_text())["vectors"]
    assert len(vectors) > 300
    for width, height, minimum, maximum, multi_scale, expected in vectors:
        processor = processor_of(min_patches=minimum, max_patches=maximum, multi_scale=bool(multi_scale))
        (scales,) = processor.plan([(height, width)])
        assert [processor.grid(*scale) for scale in scales] == expected, (width, height)
        planner = ImagePlanner(
            patch_size=16,
            merge_size=2,
            min_pixels=minimum * 256,
            max_pixels=maximum * 256,
            multi_scale=bool(multi_scale),
            scale_ratio=0.7071,
        )
        (planned,) = planner.plan_images([(height, width)])
        assert [(plan.resized_height, plan.resized_width) for plan in planned] == scales


def test_prompts_expand_as_the_reference_does(golden_dir: Path) -> None:
    prompts = json.loads((golden_dir / "public" / "preprocess" / "prompts.json").read_text())["prompts"]
    expander = SimpleNamespace(image_processor=NaViLImageProcessor())
    for prompt in prompts:
        expected = "".join(part if name == "text" else name * part for name, part in prompt["prompt"])
        written = "".join(
            part if name == "text" else {"<img>": "<image>"}.get(name, "") for name, part in prompt["prompt"]
        )
        grids = iter(prompt["image_grid_thw"])
        images = [[next(grids) for _ in range(count)] for count in prompt["num_scales"]]
        placeholders = written.count("<image>")
        assert NaViLProcessor.expand(expander, written, images[:placeholders]) == expected
        if placeholders != len(images):
            with pytest.raises(ValueError, match="1 <image> placeholders in the text but 2 images"):
                NaViLProcessor.expand(expander, written, images)


@pytest.mark.parametrize(("template", "family"), TEMPLATES)
def test_chats_become_the_references_prompts(golden_dir: Path, tmp_path: Path, template: str, family: str) -> None:
    tokenizer = tiny_tokenizer(tmp_path).hugging_face
    system_message = default_system_message(tiny_model(family, token_order="window"), trained_here=False)
    vocabulary = {*tokenizer.get_vocab(), *(("<think>", "</think>") if family == "qwen3" else ())}
    written = chat_template(vocabulary, system_message)
    processor = NaViLProcessor(NaViLImageProcessor(min_pixels=1024), tokenizer, chat_template=written)
    pictures = [Image.new("RGB", size) for size in ((100, 66), (40, 40))]  # of the grids that the prompts are for
    prompts = json.loads((golden_dir / "public" / "preprocess" / "prompts.json").read_text())["prompts"]
    cases = [prompt for prompt in prompts if prompt["template"] == template]
    assert len(cases) == 6
    for case in cases:
        expected = tokenizer("".join(part if name == "text" else name * part for name, part in case["prompt"]))
        question, system = case["question"], {"role": "system", "content": case["system_message"]}
        pieces = question.removeprefix("<image>\n").split("<image>")
        count = max(question.count("<image>"), 1) if "<image>" in question else len(case["num_scales"])
        images = [{"type": "image", "image": picture} for picture in pictures[:count]]
        content: list[Any] = [{"type": "text", "text": pieces[0]}]
        if len(pieces) == 1:
            content = [*images, *content]
        for image, piece in zip(images, pieces[1:], strict=False):
            content += [image, {"type": "text", "text": piece}]
        chats = [[system, {"role": "user", "content": content}]]
        if case["system_message"] == AUTHORS_SYSTEM_MESSAGE:
            chats.append([{"role": "user", "content": content}])
        for chat in chats:
            inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
            assert inputs["input_ids"].tolist() == [expected["input_ids"]]
            if count == 2:
                assert inputs["image_grid_thw"].tolist() == case["image_grid_thw"]
