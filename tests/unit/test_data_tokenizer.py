"""Samples as tokens: control tokens in a text stay text, misfits are refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from navil_megatron.config.errors import UserError
from navil_megatron.config.model import SPECIAL_TOKENS
from navil_megatron.data.tokenizer import SampleTokenizer, build_tokenizer, load_tokenizer
from navil_megatron.data.types import Content, Turn

CAPTIONS = ["a red apple left of a bicycle", "a bicycle above a red apple"] * 3
CONTROL = (*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>", "<pad>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(CAPTIONS, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> SampleTokenizer:
    return load_tokenizer(folder)


def test_the_folder_reloads_in_transformers(folder: Path, tokenizer: SampleTokenizer) -> None:
    loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert tuple(loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS))) == tokenizer.special_token_ids
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|im_end|>", tokenizer.end_id)
    assert (loaded.pad_token, loaded.pad_token_id) == ("<pad>", tokenizer.pad_id)
    assert loaded(CAPTIONS[0]).input_ids == tokenizer.encode(CAPTIONS[0])
    assert len(tokenizer.encode("a red apple")) == 3
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    chat = [{"role": "user", "content": [image, image, text, image]}]
    prompt = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n<image>\n<image>\nWhat?<image><|im_end|><|im_start|>assistant\n"


def test_the_same_captions_give_the_same_tokenizer(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    assert build_tokenizer(CAPTIONS, tmp_path / "same").fingerprint == tokenizer.fingerprint
    assert build_tokenizer(CAPTIONS[:1] * 9, tmp_path / "other").fingerprint != tokenizer.fingerprint


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(CONTROL), st.text(max_size=8)), max_size=6))
def test_no_caption_gives_a_control_token(tokenizer: SampleTokenizer, parts: list[str]) -> None:
    caption = "".join(parts)
    ids = tokenizer.encode(caption)
    assert not {*tokenizer.special_token_ids, tokenizer.end_id, tokenizer.pad_id} & set(ids)
    assert tokenizer.hugging_face.decode(ids) == caption
    assert tokenizer.count([caption, "x"], [0, 3]).tolist() == [len(ids) + 1, 2]


def control_ids(tokenizer: SampleTokenizer) -> set[int]:
    return set(tokenizer.hugging_face.convert_tokens_to_ids(list(CONTROL)))


TEXTS = st.lists(st.one_of(st.sampled_from(CONTROL), st.text(max_size=8)), max_size=5).map("".join)
TURNS = st.one_of(
    st.builds(Turn, st.sampled_from(["system", "assistant"]), st.tuples(TEXTS)),
    st.builds(Turn, st.just("user"), st.lists(st.one_of(st.none(), TEXTS), max_size=4).map(tuple)),
)
CONTENTS = st.one_of(TEXTS, st.lists(TURNS, min_size=1, max_size=5).map(tuple))


def num_images(content: Content) -> int:
    return 2 if isinstance(content, str) else sum(turn.parts.count(None) for turn in content)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(CONTENTS, max_size=4))
def test_counts_are_those_of_the_pieces_and_no_text_forges_a_control_token(
    tokenizer: SampleTokenizer, contents: list[Content]
) -> None:
    images = [num_images(content) for content in contents]
    pieces = [tokenizer.pieces(content, count) for content, count in zip(contents, images, strict=True)]
    assert tokenizer.count(contents, images).tolist() == [sum(len(p.ids) for p in sample) for sample in pieces]
    assert [sum(piece.image for piece in sample) for sample in pieces] == images
    for content, sample in zip(contents, pieces, strict=True):
        found = [token for piece in sample for token in piece.ids if token in control_ids(tokenizer)]
        start, end = tokenizer.hugging_face.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        assert found == ([end] if isinstance(content, str) else [start, end] * len(content))
        text = tokenizer.hugging_face.decode([token for piece in sample for token in piece.ids if token not in found])
        parts = [content] if isinstance(content, str) else [part for turn in content for part in turn.parts if part]
        assert all(part in text for part in parts)


def test_conversations_need_the_tokens_of_turns(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text().replace("<|im_start|>", "<|turn|>"))
    plain = load_tokenizer(tmp_path)
    conversation = (Turn("assistant", ("x",)),)
    assert plain.count(["x"], [0]).tolist() == [2]
    for use in (plain.pieces, lambda content, images: plain.count([content], [images])):
        with pytest.raises(UserError, match="has no <|im_start|> and <|im_end|>, which conversations need: add them"):
            use(conversation, 0)


def test_a_copy_for_another_process_reads_no_control_tokens_out_of_text(tokenizer: SampleTokenizer) -> None:
    tokenizer.hugging_face(["a", "a red apple"], padding=True)  # leaves its mark on the backend
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "".join(CONTROL)
    assert copy.encode(text) == tokenizer.encode(text)
    assert copy.fingerprint == tokenizer.fingerprint


def test_ids_must_be_those_of_the_model(folder: Path, tokenizer: SampleTokenizer) -> None:
    ids = list(tokenizer.special_token_ids)
    assert load_tokenizer(folder, ids).special_token_ids == tuple(ids)
    ids[2], ids[4] = ids[4], ids[2]
    with pytest.raises(
        UserError, match=r"does not fit model.special_token_ids \(<IMG_CONTEXT> is .*; set|: set them to"
    ):
        load_tokenizer(folder, ids)


def test_tokenizers_that_cannot_serve_are_refused(folder: Path, tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[str, dict], None]) -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        for file_name in ("tokenizer.json", "tokenizer_config.json"):
            fields = json.loads((target / file_name).read_text())
            change(file_name, fields)
            (target / file_name).write_text(json.dumps(fields))
        return target

    def drop_token(file_name: str, fields: dict) -> None:
        key = "added_tokens" if file_name == "tokenizer.json" else "extra_special_tokens"
        fields[key] = [t for t in fields[key] if (t["content"] if isinstance(t, dict) else t) != "<IMG_CONTEXT>"]

    def drop_end(file_name: str, fields: dict) -> None:
        fields.pop("eos_token", None)

    def as_plain_tokens(file_name: str, fields: dict) -> None:
        if "extra_special_tokens" in fields:
            fields["extra_special_tokens"] = []
        for token in fields.get("added_tokens", []):
            token["special"] = False

    with pytest.raises(UserError, match="lacks <IMG_CONTEXT>: add them as special tokens"):
        load_tokenizer(changed("dropped", drop_token))
    with pytest.raises(UserError, match=r"has no end \(eos\) token"):
        load_tokenizer(changed("endless", drop_end))
    with pytest.raises(UserError, match="reads .*<IMG_CONTEXT>.* out of plain text"):
        load_tokenizer(changed("plain", as_plain_tokens))
    with pytest.raises(UserError, match="is missing: set data.tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "empty")
