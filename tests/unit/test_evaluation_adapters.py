"""The adapters against the toolkits' own base classes and containers, where these are installed."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from navil_megatron.config.errors import UserError
from navil_megatron.evaluation.adapters.turns import answer_chats
from navil_megatron.hf.generate import Captioner, generate_texts, load_for_generation
from tests.unit.hf_folders import PICTURES, export_example


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_example(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def captioner(exported: Path) -> Captioner:
    return load_for_generation(exported)


def chat(picture: Image.Image, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def test_a_chat_is_answered_as_its_prompt_is(captioner: Captioner) -> None:
    chats = [chat(picture, text) for picture, text in zip(PICTURES, ("a", "a <image>red square", ""), strict=True)]
    prompts = [
        captioner.processor.apply_chat_template(one, add_generation_prompt=True)
        for one in (chat(PICTURES[0], "a"), chat(PICTURES[1], "a red square"), chat(PICTURES[2], ""))
    ]
    expected = generate_texts(captioner, [[picture] for picture in PICTURES], prompts, 5)
    assert answer_chats(captioner, chats, 5) == [text.strip() for text in expected]
    plain = generate_texts(captioner, [[PICTURES[0]]], ["<image>a"], 5)
    assert answer_chats(captioner, [chat(PICTURES[0], "a")], 5, "plain") == [text.strip() for text in plain]
    with pytest.raises(UserError, match="not 'video'"):
        answer_chats(captioner, [[{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}]], 5)


def test_lmms_eval_runs_the_model(exported: Path, captioner: Captioner) -> None:
    pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed", exc_type=ImportError)
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from navil_megatron.evaluation.adapters.lmms_eval_manifest import manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    model_class = registry.get_model_class("navil")  # checks the base class and the kind of model
    assert not model_class.__abstractmethods__
    model = model_class.create_from_arg_string(
        f"pretrained={exported},dtype=float32", {"batch_size": 2, "device": "cpu"}
    )
    model.task_dict = {"task": {"test": [{"image": picture} for picture in PICTURES]}}

    def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": "a"}]
        return [{"role": "user", "content": content}]

    def request(number: int, settings: dict[str, Any]) -> Any:
        arguments = ("a", messages, settings, number, "task", "test")
        metadata = {"task": "task", "doc_id": number, "repeats": 1}
        return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)

    settings = [{"max_new_tokens": 5}, {"max_new_tokens": 3, "temperature": 0}, {"max_new_tokens": 5}]
    found = model.generate_until([request(number, one) for number, one in enumerate(settings)])
    alone = [
        answer_chats(captioner, [chat(picture, "a")], one["max_new_tokens"])[0]
        for picture, one in zip(PICTURES, settings, strict=True)
    ]
    assert found == alone
    (cut,) = model.generate_until([request(0, {"max_new_tokens": 5, "until": [alone[0][1:3]]})])
    assert cut == alone[0].split(alone[0][1:3])[0]


def test_vlmevalkit_runs_the_model(exported: Path, captioner: Captioner, tmp_path: Path) -> None:
    base = pytest.importorskip("vlmeval.vlm.base", reason="VLMEvalKit is not installed", exc_type=ImportError)
    adapter = importlib.import_module("navil_megatron.evaluation.adapters.vlmevalkit_model")
    assert issubclass(adapter.NaViL, base.BaseModel)
    theirs = list(inspect.signature(base.BaseModel.generate_inner).parameters)
    assert list(inspect.signature(adapter.NaViL.generate_inner).parameters) == theirs
    model = adapter.NaViL(str(exported), device="cpu", dtype="float32", max_new_tokens=5)
    PICTURES[0].save(tmp_path / "0.png")
    found = model.generate([{"type": "image", "value": str(tmp_path / "0.png")}, {"type": "text", "value": "a"}])
    assert [found] == answer_chats(captioner, [chat(PICTURES[0], "a")], 5)
    assert not model.use_custom_prompt("TextVQA_VAL")
