"""One prompt: what a training row holds is what the processor of the exported folder writes, id for id."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer

from navil_megatron.blueprint.chat_template import (
    AUTHORS_SYSTEM_MESSAGE,
    PLACEHOLDER,
    TURN_TOKENS,
    chat_template,
    default_system_message,
)
from navil_megatron.blueprint.image_plan import ImagePlanner, image_grid_thw
from navil_megatron.config.data import DataConfig
from navil_megatron.config.model import SPECIAL_TOKENS
from navil_megatron.data.content import dump_content, parse_content
from navil_megatron.data.encode import encode_sample
from navil_megatron.data.tokenizer import SampleTokenizer, load_tokenizer
from navil_megatron.data.types import EncodedSample, SampleId, Turn
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.remote_code import processing_navil_chat
from tests.unit.hf_examples import tiny_model, tiny_tokenizer, with_tokenizer, write_checkpoint
from tests.unit.hf_folders import PICTURES

BOUNDS = {"min_image_pixels": 1024, "max_image_pixels": 8192}


class Model(NamedTuple):
    """A run's side and the exported folder's."""

    tokenizer: SampleTokenizer
    planner: ImagePlanner
    processor: Any

    def row(self, member: bytes, is_json: bool, pictures: Sequence[Image.Image]) -> EncodedSample:
        """The sample as the data path reads it from a shard."""
        _, content = parse_content(member, is_json, len(pictures))
        scales = self.planner.plan_images([(picture.height, picture.width) for picture in pictures])
        return encode_sample(SampleId(0, 0), content, scales, self.tokenizer, self.planner.merge_size)

    def chat(self, messages: list[dict], **options: Any) -> tuple[list[int], np.ndarray]:
        """Ids and grids of a conversation."""
        inputs = self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        grids = inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else []
        return inputs["input_ids"][0].tolist(), np.array(grids).reshape(-1, 3)


def with_extras(folder: Path, target: Path, bos: bool, thoughts: bool) -> SampleTokenizer:
    """The tokenizer with what InternLM2 and Llama (a BOS token) or Qwen3 (thoughts, no special tokens) bring along."""
    loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if bos:
        loaded.add_special_tokens({"bos_token": "<s>"})
        loaded.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", loaded.bos_token_id)]
        )
    if thoughts:
        loaded.add_tokens(["<think>", "</think>"])
    loaded.save_pretrained(str(target))
    return load_tokenizer(target)


@pytest.fixture(
    scope="module",
    params=[
        ("llama", "raster", True),
        ("qwen3", "raster", True),
        ("internlm2", "window", False),
        ("qwen2", "raster", True),
    ],
    ids=lambda param: "-".join(map(str, param)),
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, token_order, multi_scale = request.param
    root = tmp_path_factory.mktemp(family)
    tiny_tokenizer(root / "plain")
    tokenizer = with_extras(root / "plain", root / "tokenizer", family in ("llama", "internlm2"), family == "qwen3")
    config = with_tokenizer(tiny_model(family, token_order=token_order), tokenizer)
    data = {"tokenizer": str(root / "tokenizer"), "multi_scale": multi_scale, **BOUNDS}
    write_checkpoint(root / "checkpoint", config, data=data)
    written = root / "checkpoint" / "navil_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"training": {"phase": "s2"}}))
    convert_to_hf(root / "checkpoint", root / f"exported_{family}")
    defaults = DataConfig(train_sources=(), tokenizer="", seq_length=512, **BOUNDS, multi_scale=multi_scale)
    processor = AutoProcessor.from_pretrained(root / f"exported_{family}", trust_remote_code=True)
    return Model(tokenizer, ImagePlanner.from_config(defaults, config.vision), processor)


IMAGE = {"type": "image"}
ASK = [{"role": "user", "content": "What is redder?"}, {"role": "assistant", "content": "A red square."}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


CONVERSATIONS: dict[str, list[dict]] = {
    "text alone": ASK,
    "system turn": [{"role": "system", "content": "Be brief.\n"}, *ASK],
    "several turns": [*ASK, {"role": "user", "content": "\nAnd why?"}, {"role": "assistant", "content": " It\n\nis. "}],
    "one image": [{"role": "user", "content": [IMAGE, text("左 or right? مرحبا 🦊")]}, ASK[1]],
    "several images": [{"role": "user", "content": [IMAGE, IMAGE, text("which is\n redder?"), IMAGE]}, ASK[1]],
    "images in the middle": [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [text(""), IMAGE, text("is one,"), IMAGE, text(""), text(" this\n")]},
        {"role": "assistant", "content": [text("They "), text("differ.")]},
        {"role": "user", "content": [text("and "), IMAGE]},
        ASK[1],
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation(model: Model, name: str) -> None:
    messages = CONVERSATIONS[name]
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    pictures = [PICTURES[number % 3] for number in range(parts.count(IMAGE))]
    row = model.row(json.dumps({"messages": messages}).encode(), True, pictures)
    pictured = placed(messages, pictures)
    ids, grids = model.chat(pictured)
    assert row.input_ids.tolist() == ids
    assert np.array_equal(grids, image_grid_thw(row.scales))
    learned = 0
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, _ = model.chat(pictured[:turn], add_generation_prompt=True)
            said = message["content"]
            answer = said if isinstance(said, str) else "".join(part["text"] for part in said)
            stop = len(prompt) + len(model.tokenizer.encode(answer)) + 1
            assert prompt == ids[: len(prompt)]
            assert row.loss_weights[len(prompt) : stop].all()
            assert ids[stop - 1] == model.tokenizer.end_id
            learned += stop - len(prompt)
    assert np.count_nonzero(row.loss_weights) == learned


def placed(messages: list[dict], pictures: Sequence[Image.Image]) -> list[dict]:
    """The messages with a picture in every image part."""
    places = iter(pictures)

    def filled(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [part | {"image": next(places)} if part == IMAGE else part for part in content]

    return [message | {"content": filled(message["content"])} for message in messages]


@pytest.mark.parametrize("num_images", [0, 1, 3])
@pytest.mark.parametrize("is_json", [False, True])
def test_a_caption_and_a_document(model: Model, num_images: int, is_json: bool) -> None:
    caption, pictures = "a red square\n\nأحمر 红 🦊 left of it", PICTURES[:num_images]
    member = json.dumps({"caption": caption}) if is_json else caption
    row = model.row(member.encode(), is_json, pictures)
    marks = PLACEHOLDER * num_images
    whole = model.processor(images=pictures or None, text=f"{marks}{caption}{TURN_TOKENS[1]}")
    assert row.input_ids.tolist() == whole["input_ids"][0].tolist()
    assert len(row.scales) == num_images
    if num_images:
        assert whole["image_grid_thw"].tolist() == image_grid_thw(row.scales).tolist()
        prompt = model.processor(images=pictures, text=marks)["input_ids"][0].tolist()
        assert row.input_ids[: len(prompt)].tolist() == prompt
        assert not row.loss_weights[: len(prompt)].any() and row.loss_weights[len(prompt) :].all()


@pytest.mark.parametrize(
    "document",
    [
        "Intro. <image> A paragraph. <image> The end.",
        "<image>\na red square\n\nأحمر 红 🦊 left of it",
        "<image><image>\n which\n<image>",
        "two:\n<image>\n<image> a",
    ],
)
def test_a_document_with_images_in_it(model: Model, document: str) -> None:
    pictures = [PICTURES[number % 3] for number in range(document.count(PLACEHOLDER))]
    row = model.row(document.encode(), False, pictures)
    whole = model.processor(images=pictures, text=f"{document}{TURN_TOKENS[1]}")
    assert row.input_ids.tolist() == whole["input_ids"][0].tolist()
    assert whole["image_grid_thw"].tolist() == image_grid_thw(row.scales).tolist()
    texts = [part for part in document.split(PLACEHOLDER) if part]
    learned = sum(len(model.tokenizer.encode(part)) for part in texts) + 1
    starts_with_text = not document.startswith(PLACEHOLDER) and row.input_ids[0] == model.tokenizer.encode(texts[0])[0]
    assert np.count_nonzero(row.loss_weights) == learned - starts_with_text  # nothing predicts the first token
    lists = [None if part == PLACEHOLDER else part for part in re.split(f"({PLACEHOLDER})", document) if part]
    listed = model.row(json.dumps({"texts": lists}).encode(), True, pictures)
    assert listed.input_ids.tolist() == row.input_ids.tolist()


@pytest.mark.parametrize("words", ["what does <IMG_CONTEXT> stand for?", "<|im_end|><img>", "a</img> <s>b", "<box>x"])
def test_control_words_of_a_user_are_text(model: Model, words: str) -> None:
    row = model.row(json.dumps({"caption": words}).encode(), True, PICTURES[:1])
    prompt = PLACEHOLDER + model.processor.plain(words)
    found = model.processor(images=[PICTURES[:1]] * 2, text=[prompt, PLACEHOLDER], padding=True)
    ids, mask = found["input_ids"][0].tolist(), found["attention_mask"]
    assert ids == row.input_ids[:-1].tolist() and mask[0].all()
    # The shorter one of the batch is padded on its left.
    rest = found["input_ids"][1][mask[1].bool()].tolist()
    assert rest == model.processor(images=PICTURES[:1], text=PLACEHOLDER)["input_ids"][0].tolist()
    # What no picture brought is never the picture's, be it marked or not.
    raw = model.processor(images=PICTURES[:1], text=PLACEHOLDER + "<IMG_CONTEXT> <img>")["input_ids"][0].tolist()
    wanted = model.row(b"<IMG_CONTEXT> <img>", False, PICTURES[:1]).input_ids[:-1].tolist()
    assert raw == wanted


def test_scales_are_those_of_the_run(model: Model) -> None:
    row = model.row(b"a", False, PICTURES[:1])
    assert len(row.scales[0]) == (2 if model.planner.multi_scale else 1)


# Control tokens that somebody wrote are text in both. Not so <image>, which a prompt holds for a picture.
CONTROL = (*SPECIAL_TOKENS, *TURN_TOKENS, "<pad>", "<s>", "<think>")
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1"), min_size=1, max_size=6)
WORDS = st.lists(st.one_of(PLAIN, st.sampled_from(CONTROL)), min_size=1, max_size=3).map("".join)
WORDS = WORDS.filter(lambda words: PLACEHOLDER not in words)
TURNS = st.one_of(
    st.builds(Turn, st.sampled_from(["system", "assistant"]), st.tuples(WORDS.filter(str.strip))),
    st.builds(Turn, st.just("user"), st.lists(st.one_of(st.none(), WORDS), max_size=4).map(tuple)),
)


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(TURNS, max_size=5).map(lambda turns: (*turns, Turn("assistant", ("a red",)))))
def test_any_conversation(model: Model, turns: tuple[Turn, ...]) -> None:
    pictures = [PICTURES[2]] * sum(turn.parts.count(None) for turn in turns)
    _, member = dump_content(turns)
    row = model.row(member, True, pictures)
    ids, _ = model.chat(placed(json.loads(member)["messages"], pictures))
    assert row.input_ids.tolist() == ids


def test_only_weights_of_the_authors_get_their_system_message() -> None:
    theirs, own = (tiny_model("qwen3", token_order=order) for order in ("window", "raster"))
    assert default_system_message(theirs, trained_here=False) == AUTHORS_SYSTEM_MESSAGE
    assert not default_system_message(theirs, trained_here=True)
    assert not default_system_message(own, trained_here=False)
    assert not default_system_message(tiny_model("llama", token_order="window"), trained_here=False)
    assert AUTHORS_SYSTEM_MESSAGE in str(chat_template(TURN_TOKENS, AUTHORS_SYSTEM_MESSAGE))


def test_the_names_of_marks_and_the_text_that_indexes_are_known_by() -> None:
    assert PLACEHOLDER == processing_navil_chat.PLACEHOLDER
    # In the fingerprint of every index and checkpoint that was written: another text would refuse them all.
    digest = hashlib.sha256(str(chat_template(TURN_TOKENS)).encode()).hexdigest()
    assert digest == "3cfc407105996de727b75ae00bb9629c2b959b3a082f63f54e96b6b5904634f1"
