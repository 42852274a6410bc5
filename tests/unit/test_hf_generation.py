"""The exported model at work: loaded offline by transformers in a new process, cached, batched, in fp32 and bf16."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.hf.generate import Sampling, generate_captions, load_for_generation
from navil_megatron.hf.remote_code.configuration_navil_chat import NaViLChatConfig
from navil_megatron.hf.remote_code.modeling_navil_chat import CACHE, CONTEXT, NaViL
from navil_megatron.hf.remote_code.processing_navil_chat import NaViLImageProcessor, NaViLProcessor
from tests.unit.hf_examples import FAMILIES
from tests.unit.hf_folders import PICTURES, exported_folder, picture

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(exported: Path) -> NaViL:
    return NaViL.from_pretrained(exported, config=NaViLChatConfig.from_pretrained(exported)).eval()


@pytest.fixture(scope="module")
def processor(exported: Path) -> NaViLProcessor:
    from transformers import AutoTokenizer

    settings = json.loads((exported / "preprocessor_config.json").read_text())
    return NaViLProcessor(NaViLImageProcessor(**settings), AutoTokenizer.from_pretrained(exported))


PROMPTS = ["<image>a", "<image>a red square left of", "<image>"]


def test_loads_offline_in_a_new_process(tmp_path: Path) -> None:
    """Folders of every family, one after the other."""
    picture(64, 90).save(tmp_path / "picture.png")
    folders = [exported_folder(tmp_path / family, family) for family in FAMILIES]
    script = f"""
import json, sys, torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
for folder in {[str(folder) for folder in folders]!r}:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__ == "NaViL"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=Image.open({str(tmp_path / "picture.png")!r}), text="<image>")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert not any(name.startswith("navil_megatron") for name in sys.modules)
    print(json.dumps(tokens[0, inputs["input_ids"].shape[1]:].tolist()))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    for folder, printed in zip(folders, done.stdout.splitlines()[-len(folders) :], strict=True):
        captioner = load_for_generation(folder)
        inputs = captioner.processor(images=picture(64, 90), text="<image>")
        expected = captioner.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert json.loads(printed) == expected[0, inputs["input_ids"].shape[1] :].tolist()


def test_cached_steps_equal_the_whole_row(model: NaViL, processor: NaViLProcessor) -> None:
    inputs = processor(images=PICTURES[0], text=PROMPTS[1])
    prompt = inputs["input_ids"].shape[1]
    special = model.config.special_token_ids[CONTEXT]
    generated = torch.tensor([[5, 9, special, 11]])  # a generated special token is a plain text token
    with torch.no_grad():
        row = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], generated], 1), "attention_mask": None}
        whole = model(**row, prompt_length=prompt).logits
        output = model(**inputs, use_cache=True)
        steps = [output.logits]
        for token in generated[0]:
            output = model(token.view(1, 1), use_cache=True, **{CACHE: output[CACHE]})
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)


def test_generation_computes_each_token_once(model: NaViL, processor: NaViLProcessor) -> None:
    inputs = processor(images=PICTURES[0], text=PROMPTS[1])
    lengths: list[int] = []
    hook = model.language_model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    hook.remove()
    assert lengths == [inputs["input_ids"].shape[1], 1, 1, 1]


def test_chunks_after_the_prompt_equal_the_whole_row(model: NaViL, processor: NaViLProcessor) -> None:
    ids = processor(text="a blue circle left of a green star")["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :3], use_cache=True)
        second = model(ids[:, 3:], use_cache=True, **{CACHE: first[CACHE]}).logits
    torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, **CLOSE)


def test_left_padded_batch_equals_single_rows(model: NaViL, processor: NaViLProcessor) -> None:
    batch = processor(images=[[image] for image in PICTURES], text=PROMPTS)
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        logits = model(**batch).logits
    together = model.generate(
        **batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for row, (image, text) in enumerate(zip(PICTURES, PROMPTS, strict=True)):
        single = processor(images=image, text=text)
        length = single["input_ids"].shape[1]
        with torch.no_grad():
            torch.testing.assert_close(logits[row, -length:], model(**single).logits[0], **CLOSE)
        alone = model.generate(
            **single, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        count = alone.sequences.shape[1] - length
        assert alone.sequences[0, length:].tolist() == together.sequences[row, -6:][:count].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_batch_of_none_to_three_images_equals_single_rows(
    model: NaViL, processor: NaViLProcessor, use_cache: bool
) -> None:
    images = [[], PICTURES[:1], PICTURES[1:], PICTURES]
    texts = ["a red square left of", "<image>a", "a <image> and <image>", "<image><image><image>"]
    batch = processor(images=images, text=texts)
    assert len(batch["image_grid_thw"]) > 6  # several scales of the larger pictures
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**batch, use_cache=use_cache, **settings)
    for row, (pictures, text) in enumerate(zip(images, texts, strict=True)):
        single = processor(images=pictures, text=text)
        alone = model.generate(**single, **settings)
        count = len(alone.logits)
        assert together.sequences[row, -6:][:count].tolist() == alone.sequences[0, -count:].tolist()
        for step in range(count):
            torch.testing.assert_close(together.logits[step][row], alone.logits[step][0], **CLOSE)


def test_static_cache_equals_the_growing_one(model: NaViL, processor: NaViLProcessor) -> None:
    inputs = processor(images=[PICTURES[:1], []], text=["<image>a", "a red square"])
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **settings)
    if hasattr(model, "_supports_static_cache"):  # transformers up to 4.5x asks, and is told no
        with pytest.raises(ValueError, match="static"):
            model.generate(**inputs, cache_implementation="static", **settings)
        return
    found = model.generate(**inputs, cache_implementation="static", **settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)


def test_looking_ahead_equals_one_by_one(model: NaViL, processor: NaViLProcessor) -> None:
    inputs = processor(images=PICTURES[0], text="<image>a red a red a")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


def test_right_padding_changes_no_logits(model: NaViL, processor: NaViLProcessor) -> None:
    batch = processor(images=[[image] for image in PICTURES], text=PROMPTS, padding_side="right")
    with torch.no_grad():
        logits = model(**batch).logits
        single = processor(images=PICTURES[2], text=PROMPTS[2])
        expected = model(**single).logits[0]
    torch.testing.assert_close(logits[2, : len(expected)], expected, **CLOSE)


def test_beams_repeat_rows_with_their_images(model: NaViL, processor: NaViLProcessor) -> None:
    batch = processor(
        images=[[PICTURES[0], PICTURES[1]], [], [PICTURES[2]]], text=["<image> and <image>", "a", "<image>"]
    )
    torch.manual_seed(0)
    beams = model.generate(**batch, max_new_tokens=4, num_beams=2, do_sample=False)
    assert len(beams) == 3
    several = model.generate(**batch, max_new_tokens=4, num_beams=4, num_return_sequences=2, do_sample=False)
    sampled = model.generate(**batch, max_new_tokens=4, num_return_sequences=2, do_sample=True)
    assert len(several) == len(sampled) == 6
    expanded = model._repeat_images(batch["input_ids"], batch["pixel_values"], batch["image_grid_thw"], 2)
    ids = batch["input_ids"].repeat_interleave(2, 0)
    with torch.no_grad():
        repeated = model(ids, batch["attention_mask"].repeat_interleave(2, 0), **expanded).logits
        torch.testing.assert_close(repeated[::2], model(**batch).logits, **CLOSE)
        torch.testing.assert_close(repeated[::2], repeated[1::2], **CLOSE)


def test_flat_patches_and_bf16(model: NaViL, processor: NaViLProcessor) -> None:
    inputs = processor(images=PICTURES[0], text=PROMPTS[0])
    with torch.no_grad():
        logits = model(**inputs).logits
        flat = model(**(dict(inputs) | {"pixel_values": inputs["pixel_values"].flatten(1)})).logits
        assert torch.equal(logits, flat)
        low = NaViL(model.config).to(torch.bfloat16)
        low.load_state_dict(model.state_dict())
        labels = inputs["input_ids"]
        output = low.eval()(**inputs, labels=labels)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(output.logits.float().flatten(), logits.flatten(), 0) > 0.99


def test_loss_ignores_what_it_should(model: NaViL, processor: NaViLProcessor) -> None:
    inputs = processor(images=PICTURES[0], text=PROMPTS[1])
    labels = inputs["input_ids"].clone()
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        is_context = inputs["input_ids"][:, :-1] == model.config.special_token_ids[CONTEXT]
        expected = torch.nn.functional.cross_entropy(output.logits[:, :-1][~is_context], labels[:, 1:][~is_context])
        torch.testing.assert_close(output.loss, expected)
        assert model(**inputs, labels=torch.full_like(labels, -100)).loss == 0


def test_images_and_placeholders_must_agree(model: NaViL, processor: NaViLProcessor) -> None:
    inputs = processor(images=PICTURES[0], text=PROMPTS[0])
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"the prompt holds \d+ <IMG_CONTEXT> tokens, the images give"):
        model(inputs["input_ids"][:, 3:], pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    with pytest.raises(ValueError, match="promises"):
        model(inputs["input_ids"], pixel_values=inputs["pixel_values"][4:], image_grid_thw=inputs["image_grid_thw"])


def test_special_token_ids_from_a_tokenizer(model: NaViL, processor: NaViLProcessor) -> None:
    fresh = NaViL(NaViLChatConfig(**(model.config.to_dict() | {"special_token_ids": None})))
    with pytest.raises(ValueError, match="init_special_token_ids"):
        fresh(torch.tensor([[1, 2]]))
    fresh.init_special_token_ids(processor.tokenizer)
    assert list(fresh.config.special_token_ids) == list(model.config.special_token_ids)


def test_processor_places_images(processor: NaViLProcessor) -> None:
    one = processor(images=PICTURES[0], text="what")
    assert torch.equal(one["input_ids"], processor(images=[PICTURES[0]], text="<image>what")["input_ids"])
    flat = processor(images=PICTURES, text=PROMPTS)
    nested = processor(images=[[image] for image in PICTURES], text=PROMPTS)
    assert torch.equal(flat["input_ids"], nested["input_ids"])
    assert "pixel_values" not in processor(text="what")
    with pytest.raises(ValueError, match="2 images for 1 <image> placeholders"):
        processor(images=PICTURES[:2], text=["<image>", "b"])


def test_generate_captions(exported: Path, tmp_path: Path) -> None:
    captioner = load_for_generation(exported)
    PICTURES[1].save(tmp_path / "one.png")
    groups = [[picture] for picture in PICTURES]
    batched = generate_captions(captioner, [groups[0], [tmp_path / "one.png"], groups[2]], max_new_tokens=5)
    assert batched == generate_captions(captioner, groups, max_new_tokens=5, batch_size=2)
    # Draws from the likeliest token alone are greedy; others follow the seed.
    assert batched == generate_captions(captioner, groups, max_new_tokens=5, sampling=Sampling(1.0, 1e-6))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generate_captions(captioner, groups, max_new_tokens=5, sampling=Sampling(5.0)))
    assert drawn[0] == drawn[1] != drawn[2]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad\.png cannot be read as a picture"):
        generate_captions(captioner, [[tmp_path / "bad.png"]])
    with pytest.raises(UserError, match=r"lacks config\.json"):
        load_for_generation(tmp_path)


def test_generate_talks_and_takes_several_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported_folder(tmp_path / "llama", "llama")
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for number, file in enumerate(files):
        PICTURES[number].save(file)
    captioner = load_for_generation(folder)

    def answer(inputs: Any) -> str:
        tokens = captioner.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return str(captioner.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    words = ["generate", str(folder), *map(str, files), "--max-new-tokens", "4", "--json"]
    assert main([*words, "--prompt", "<image> and <image>b"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["answers"]
    expected = answer(captioner.processor(images=[PICTURES[:2]], text=["<image> and <image>b"]))
    assert found == {"images": [*map(str, files)], "text": expected}
    assert main([*words, "--prompt", "<image><image><image>"]) == 2
    assert "found 2 images, expected a multiple of 3" in capsys.readouterr().err

    monkeypatch.setattr(sys, "stdin", io.StringIO("what <IMG_CONTEXT> is it?\n\nand why?\n"))
    assert main([*words, "--chat"]) == 0
    *said, report = capsys.readouterr().out.splitlines()
    content = [{"type": "image", "image": picture} for picture in PICTURES[:2]]
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": [*content, {"type": "text", "text": "what <IMG_CONTEXT> is it?"}]}
    ]
    settings = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    first = answer(captioner.processor.apply_chat_template(talk, **settings))
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "and why?"}]
    second = answer(captioner.processor.apply_chat_template(talk, **settings))
    assert [turn["text"] for turn in json.loads(report)["turns"]] == [
        "what <IMG_CONTEXT> is it?",
        first,
        "and why?",
        second,
    ]
    assert "\n".join(said) == f"{first}\n{second}"
