"""A bare LLM from its folder to a checkpoint and on to a NaViL folder, by the commands that users type."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from navil_megatron.cli import main
from navil_megatron.config.load import section_from_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.checkpoint_folder import read_config
from navil_megatron.hf.inspect import inspect
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.verify import read_model_config, same_bits
from tests.unit.hf_examples import FAMILIES
from tests.unit.llm_examples import VISION, save_random_llm
from tests.unit.test_hf_llm_start import saved_tokenizer

RUN = "[model.vision]\n" + "\n".join(f"{name} = {value}" for name, value in VISION.items())


@pytest.fixture
def llm(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / "llm"
    save_random_llm(getattr(request, "param", "llama"), 3, folder)
    shutil.copytree(saved_tokenizer(tmp_path / "tokenizer"), folder, dirs_exist_ok=True)
    (tmp_path / "run.toml").write_text(RUN + "\n[training]\nseed = 7\n")
    return folder


def convert(llm: Path, *more: str) -> int:
    target = str(llm.parent / "start")
    return main(["convert", "from-hf", str(llm), target, "--config", str(llm.parent / "run.toml"), *more])


@pytest.mark.parametrize("llm", FAMILIES, indirect=True)
def test_llm_to_checkpoint_to_folder(llm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, exported = llm.parent / "start", llm.parent / "exported"
    assert convert(llm, "model.language.visual_expert_init=copy", "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["seed"], report["verified"]) == (7, True)
    model = read_model_config(start)
    tables = tomllib.loads((start / "model.toml").read_text())
    assert section_from_dict(ModelConfig, tables["model"], "model.toml") == model
    assert read_config(start)["data"]["tokenizer"] == str(start / "tokenizer")
    assert main(["convert", "to-hf", str(start), str(exported)]) == 0
    stored, made = TensorFolder(llm), TensorFolder(exported)
    rows = {key: len(tensor) for key, tensor in stored.items()}
    for key, tensor in stored.items():
        if key != "lm_head.weight" or not model.language.tied_embeddings:
            assert same_bits(made[f"language_model.{key}"][: rows[key]], tensor), key
    assert inspect(llm)["kind"] == "LLM folder"
    assert inspect(llm)["num_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert inspect(start)["parts"]["visual_experts"] == inspect(start)["parts"]["text_experts"]


def test_jobs_and_seeds(llm: Path) -> None:
    digests = {}
    for name, options in {"one": (), "two": ("--jobs", "2"), "other": ("--seed", "8")}.items():
        assert convert(llm, *options) == 0
        digests[name] = json.loads((llm.parent / "start" / "checksums.json").read_text())["tensors"]
        (llm.parent / "start").rename(llm.parent / name)
    assert digests["one"] == digests["two"]
    drawn = {key for key, value in digests["one"].items() if digests["other"][key] != value}
    assert {key.partition(".")[0] for key in drawn} == {"vision_encoder", "connector", "special_token_embedding"}


def test_what_does_not_fit_is_refused_in_one_line(llm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, *more: str) -> None:
        assert convert(llm, *more) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("error: ") == 1
        assert not list(llm.parent.glob("start*"))

    refused("model.language.hidden_size is 5", "model.language.hidden_size=5")
    refused("training.seed is 'x'", "training.seed=x")
    (llm.parent / "run.toml").write_text("")
    refused("is a language model alone; give the encoder's sizes")
    (llm.parent / "run.toml").write_text(RUN)
    tensors = load_file(llm / "model.safetensors")
    key = next(key for key in tensors if "mlp" in key)
    save_file(tensors | {"extra": torch.zeros(3)}, llm / "model.safetensors")
    refused("extra [3] is unknown")
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, llm / "model.safetensors")
    refused(f"{key} {list(tensors[key].shape)} is missing")
    save_file(tensors | {key: tensors[key].bfloat16()}, llm / "model.safetensors")
    refused("choose one type with --dtype")
    assert convert(llm, "--dtype", "bfloat16") == 0


def test_settings_of_an_llm_are_refused_for_a_navil(llm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(llm) == 0
    assert main(["convert", "to-hf", str(llm.parent / "start"), str(llm.parent / "exported")]) == 0
    assert main(["convert", "from-hf", str(llm.parent / "exported"), str(llm.parent / "again"), "--seed", "3"]) == 2
    assert "holds a whole NaViL" in capsys.readouterr().err
