"""An exported folder in a user's hands: loaded by every Auto class, saved anew, prompted, fine-tuned, read about."""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    pipeline,
)
from transformers.utils import is_accelerate_available

from navil_megatron.config.load import config_to_dict, section_from_dict
from navil_megatron.config.run import NaViLConfig
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.exported.model_card import config_digest, model_card
from navil_megatron.hf.generate import DTYPE_ARGUMENT
from navil_megatron.hf.ingest import convert_from_hf
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.verify import same_bits
from tests.ranks import tiny_config
from tests.tolerances import BF16_LOGITS
from tests.unit.config_examples import example_tables
from tests.unit.hf_examples import FAMILIES, tiny_model
from tests.unit.hf_folders import PICTURES, export_example, exported_folder

OURS = {"trust_remote_code": True, "local_files_only": True}
QUESTION = [
    {"role": "system", "content": "Answer."},
    {
        "role": "user",
        "content": [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "a red square"}],
    },
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **OURS).eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder, **OURS)


def new_tokens(model: Any, inputs: Any, **settings: Any) -> list[list[int]]:
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


def assert_same_weights(model: Any, other: Any) -> None:
    expected, found = model.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    assert all(same_bits(expected[key], found[key]) for key in expected)


def test_every_auto_class_and_argument_gives_the_same_model(folder: Path, model: Any, processor: Any) -> None:
    assert AutoConfig.from_pretrained(folder, **OURS).model_type == "navil_chat"
    for auto in (AutoModel, AutoModelForCausalLM):
        assert_same_weights(model, auto.from_pretrained(folder, **OURS))
    mapped = model
    if is_accelerate_available():  # without it transformers itself refuses a device_map
        mapped = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", **OURS)
        assert_same_weights(model, mapped)
    inputs = processor(images=PICTURES[0], text="<image>a red")
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(logits, mapped(**inputs).logits)
        for name in {DTYPE_ARGUMENT, "torch_dtype"}:
            low = AutoModelForImageTextToText.from_pretrained(folder, **{name: torch.bfloat16}, **OURS)
            assert low.dtype == torch.bfloat16
            moved = low(**inputs).logits.float() - logits
            assert moved.norm() / logits.norm() < BF16_LOGITS
    # The bound tells rounding from an error: the other modality's experts are far beyond it.
    with torch.no_grad():
        wrong = model(**(dict(inputs) | {"pixel_values": -inputs["pixel_values"]})).logits
    assert (wrong - logits).norm() / logits.norm() > 3 * BF16_LOGITS
    assert new_tokens(low, inputs, max_new_tokens=3)


def test_generation_config(folder: Path, processor: Any) -> None:
    stream, logger = io.StringIO(), logging.getLogger("transformers")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        config = GenerationConfig.from_pretrained(folder)
        config.validate()
    finally:
        logger.removeHandler(handler)
    assert not stream.getvalue()
    assert config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config.pad_token_id == processor.tokenizer.pad_token_id
    assert config.max_new_tokens == 1024
    assert config.do_sample is False


def test_save_pretrained_round_trip(folder: Path, model: Any, processor: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size="200KB")
    processor.save_pretrained(saved)
    again, report = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True, **OURS)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert_same_weights(model, again)
    other = AutoProcessor.from_pretrained(saved, **OURS)
    for template in (QUESTION, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]):
        inputs, expected = (p.apply_chat_template(template, **prompted()) for p in (other, processor))
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert new_tokens(again, inputs, max_new_tokens=4) == new_tokens(model, inputs, max_new_tokens=4)
    # What transformers saved is a folder for our converter, too, and comes out of it as it was.
    convert_from_hf(saved, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    before, after = TensorFolder(folder), TensorFolder(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    for name in ("preprocessor_config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((tmp_path / "hf" / name).read_text()), name


def prompted() -> dict[str, Any]:
    return {"add_generation_prompt": True, "tokenize": True, "return_dict": True}


def test_chats_in_a_batch_equal_chats_alone(model: Any, processor: Any) -> None:
    two = [{"type": "text", "text": "A "}, {"type": "image", "image": PICTURES[1]}, {"type": "text", "text": " and "}]
    chats = [
        [{"role": "user", "content": "a red square"}],
        QUESTION,
        [
            {"role": "user", "content": [{"type": "image", "image": PICTURES[2]}, *two]},
            {"role": "assistant", "content": "a blue circle"},
            {"role": "user", "content": [{"type": "image", "image": PICTURES[0]}]},
        ],
    ]
    batch = processor.apply_chat_template(chats, padding=True, **prompted())
    together = new_tokens(model, batch, max_new_tokens=5)
    for row, chat in enumerate(chats):
        single = processor.apply_chat_template(chat, **prompted())
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], single["input_ids"][0])
        (alone,) = new_tokens(model, single, max_new_tokens=5)
        assert together[row][: len(alone)] == alone


def test_chat_template_places_images(processor: Any, tmp_path: Path) -> None:
    def prompt(*content: Any) -> str:
        return processor.apply_chat_template([{"role": "user", "content": list(content)}])

    image, text = {"type": "image"}, {"type": "text", "text": "x"}
    start, end = "<|im_start|>user\n", "<|im_end|>"
    assert prompt(image, image, text) == f"{start}<image>\n<image>\nx{end}"
    assert prompt(text, image, text, image) == f"{start}x<image>x<image>{end}"
    assert processor.apply_chat_template([{"role": "user", "content": "x"}]) == f"{start}x{end}"
    PICTURES[0].save(tmp_path / "picture.png")
    by_path = {"type": "image", "path": str(tmp_path / "picture.png")}
    by_address = {"type": "image_url", "image_url": {"url": str(tmp_path / "picture.png")}}
    expected = processor(images=PICTURES[0], text=prompt(image, text))
    for part in (by_path, by_address, {"type": "image", "image": PICTURES[0]}):
        chat = [{"role": "user", "content": [part, text]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="content of type 'video' is not supported"):
        prompt({"type": "video"})
    with pytest.raises(ValueError, match="1 <image> placeholders in the text but 0 images"):
        processor.apply_chat_template([{"role": "user", "content": [image, text]}], tokenize=True)


def test_upright_pictures_as_in_training(processor: Any) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    PICTURES[0].save(file, format="PNG", exif=turned)
    upright = PICTURES[0].transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(
        processor(images=Image.open(file), text="")["pixel_values"], processor(images=upright, text="")["pixel_values"]
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fine_tuning(folder: Path, processor: Any, checkpointing: bool) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, **OURS).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = processor(images=[[PICTURES[0]], []], text=["<image>a red square", "a blue"])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not silent
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    if checkpointing:  # the same arithmetic, so the same losses as without
        model.gradient_checkpointing_disable()
        plain = AutoModelForImageTextToText.from_pretrained(folder, **OURS).train()
        assert plain(**inputs, labels=labels).loss.item() == losses[0]


def test_longer_vocabulary(folder: Path, processor: Any) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, **OURS).eval()
    inputs = processor(images=PICTURES[0], text="<image>a")
    with torch.no_grad():
        before = model(**inputs).logits
        rows = before.shape[-1]
        model.resize_token_embeddings(rows + 3)
        after = model(**inputs).logits
    assert after.shape[-1] == rows + 3
    assert torch.equal(before, after[..., :rows])


def test_pipeline(folder: Path, processor: Any, model: Any) -> None:
    # transformers 4.51 finds no processor for code from a folder by itself; later versions do.
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    text = answer(images=PICTURES[0], text="<image>a", max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    inputs = processor(images=PICTURES[0], text="<image>a")
    assert text == processor.batch_decode(new_tokens(model, inputs, max_new_tokens=4), skip_special_tokens=True)[0]


def test_the_cards_code_runs(tmp_path: Path) -> None:
    home = tmp_path / "model"
    shutil.copytree(exported_folder(tmp_path, FAMILIES[0]), home)
    PICTURES[0].save(home / "picture.jpg")
    card = (home / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("max_new_tokens=64", "max_new_tokens=3")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2


@pytest.mark.parametrize("older", [False, True], ids=["", "older-than-the-name-of-a-setting"])
def test_card_says_how_it_was_trained(tmp_path: Path, older: bool) -> None:
    stored = config_to_dict(section_from_dict(NaViLConfig, example_tables(), "example"))
    if older:
        stored["training"]["precision"] = stored.pop("precision")["type"]
    checkpoint = tmp_path / "step_00000300"
    checkpoint.mkdir()
    (checkpoint / "navil_config.json").write_text(json.dumps(stored))
    card = model_card(tiny_model("qwen3"), 1, has_tokenizer=True, checkpoint=checkpoint)
    assert "| phase, precision | s2, bf16 |" in card
    assert "| step | 300 of 1,000 |" in card


def test_card_says_what_it_is(tmp_path: Path) -> None:
    folder = export_example(tmp_path, "qwen3")
    card = (folder / "README.md").read_text(encoding="utf-8")
    front, body = card.split("---\n")[1:3]
    assert "license" not in front
    assert "add a `license:` line" in body
    config = json.loads((tmp_path / "checkpoint" / "navil_config.json").read_text())
    assert f"sha256:{config_digest(config)}" in body
    language = tiny_model("qwen3").language
    assert f"| {language.num_layers} x {language.hidden_size}, {language.ffn_hidden_size} |" in body
    assert str(tmp_path) not in card
    assert config_digest({"b": 1, "a": {"c": [1, 2.5], "é": None}}) == (
        "f85001983fa2a90e23eafdb5f4af7b2e85cfb19788f7d06a791e9ca37a5b81f2"
    )


def test_digest_follows_values_alone() -> None:
    first, second = config_to_dict(tiny_config()), config_to_dict(tiny_config(training={"seed": 5}))
    assert config_digest(first["model"]) == config_digest(second["model"])
    assert config_digest(first["training"]) != config_digest(second["training"])
    assert config_digest(first) != config_digest(second)
