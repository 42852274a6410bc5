"""A tokenizer of an exported folder: loads in every version, keeps its own template, and its folder can be exported."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from navil_megatron.blueprint.chat_template import TURN_TOKENS, chat_template
from navil_megatron.config.errors import UserError
from navil_megatron.hf.exported.image_settings import generation_config, image_settings_from_hf
from navil_megatron.hf.exported.tokenizer_files import settle_tokenizer, vocabulary
from tests.unit.hf_examples import tiny_model, tiny_tokenizer

MODEL = tiny_model("qwen2")
OWN = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "a red"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_class_and_key_of_version_5_become_those_that_version_4_knows(folder: Path) -> None:
    ids = AutoTokenizer.from_pretrained(folder)("<img>a red square</img>")["input_ids"]
    config = folder / "tokenizer_config.json"
    kept = json.loads(config.read_text())
    names = [entry["content"] for entry in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]]
    for settings in (
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": names},
        {"tokenizer_class": "Their", "auto_map": {"AutoTokenizer": ["their.Their", None]}, "extra_special_tokens": {}},
    ):
        config.write_text(json.dumps({"eos_token": kept["eos_token"], "pad_token": kept["pad_token"], **settings}))
        settle_tokenizer(folder)
        written = json.loads(config.read_text())
        assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "auto_map" not in written
        assert not isinstance(written.get("extra_special_tokens"), list)
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        assert loaded("<img>a red square</img>")["input_ids"] == ids
        assert loaded.decode(ids, skip_special_tokens=True) == "a red square"


def test_a_tokenizer_keeps_its_own_template_for_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(OWN)
    assert settle_tokenizer(folder)
    shutil.copytree(folder, folder.parent / "again")
    for place in (folder, folder.parent / "again"):
        assert settle_tokenizer(place)
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "[user]a red"
        assert json.loads((place / "chat_template.json").read_text()) == {"chat_template": chat_template(TURN_TOKENS)}
        assert not (place / "chat_template.jinja").exists()


def test_a_tokenizer_without_a_template_shares_the_processors(folder: Path) -> None:
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert settle_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "<|im_start|>user\na red<|im_end|>"


def test_no_template_where_the_tokenizer_knows_no_turns(folder: Path) -> None:
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder / "tokenizer.json", added_tokens=[t for t in tokens if t["content"] != "<|im_start|>"])
    assert not settle_tokenizer(folder)
    assert not (folder / "chat_template.jinja").exists()
    assert not (folder / "chat_template.json").exists()


def test_where_decoding_stops(folder: Path) -> None:
    end = vocabulary(folder)["<|im_end|>"]
    greedy = {"do_sample": False, "max_new_tokens": 1024}
    assert generation_config({}) == greedy
    known = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    expected = greedy | {"bos_token_id": 1, "eos_token_id": [2, end], "pad_token_id": 2}
    assert generation_config(known, folder) == expected
    assert generation_config({"eos_token_id": end, "pad_token_id": 0}, folder)["eos_token_id"] == end


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "preprocessor_config.json",
            {"min_pixels": "many", "multi_scale": 1},
            r"min_pixels is 'many'.*multi_scale is 1",
        ),
        ("preprocessor_config.json", {"max_pixels": -5}, r"max_pixels is -5, expected a number \(int\) above 0"),
        ("processor_config.json", {"image_processor": {"scale_ratio": float("nan")}}, r"scale_ratio is nan"),
        ("processor_config.json", {"image_processor": [1]}, r"image_processor is \[1\], expected an object"),
    ],
)
def test_image_settings_that_cannot_be(tmp_path: Path, file: str, content: dict, message: str) -> None:
    assert image_settings_from_hf(tmp_path, {"max_dynamic_patch": 4}, MODEL)["max_image_pixels"] == 1024
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        image_settings_from_hf(tmp_path, {}, MODEL)
    with pytest.raises(UserError, match=r"config\.json: min_dynamic_patch is None"):
        image_settings_from_hf(tmp_path / "none", {"min_dynamic_patch": None}, MODEL)
