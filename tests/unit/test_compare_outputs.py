"""``convert verify --logits``: the training model and the exported one on the same prompts, layer by layer."""

import dataclasses
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from navil_megatron.cli import main
from navil_megatron.hf.export import convert_to_hf
from tests.ranks import run_ranks
from tests.unit.hf_examples import FAMILIES, tiny_model, tiny_tokenizer, with_tokenizer, write_checkpoint


def verify(*words: object) -> tuple[int, dict, str]:
    """Exit status, report and standard error; a process of its own, because megatron-core stays in one."""
    command = ["convert", "verify", *map(str, words), "--logits", "--json"]
    ((status, printed, errors),) = run_ranks(1, _run_command, command)
    return status, json.loads(printed.splitlines()[-1]) if printed else {}, errors


def _run_command(_rank: int, _world_size: int, command: list[str]) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as errors:
        status = main(command)
    return status, printed.getvalue(), errors.getvalue()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    values = np.random.default_rng(5).integers(0, 255, (70, 110, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def exported(family: str, tmp_path: Path, **experts: int) -> tuple[Path, Path]:
    """A checkpoint with small images and its export."""
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    model = with_tokenizer(tiny_model(family, token_order="window", window_size=4), tokenizer)
    model = dataclasses.replace(model, language=dataclasses.replace(model.language, **experts))
    data = {"tokenizer": str(tmp_path / "tokenizer"), "min_image_pixels": 1024, "max_image_pixels": 16_384}
    write_checkpoint(tmp_path / "weights", model, data=data)
    convert_to_hf(tmp_path / "weights", tmp_path / "hf")
    return tmp_path / "weights", tmp_path / "hf"


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("internlm2", {}),
        ("qwen3", {"num_experts": 3, "experts_per_token": 2}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in FAMILIES if name != "internlm2"),
    ],
)
def test_checkpoint_and_export_compute_the_same(
    family: str, experts: dict[str, int], tmp_path: Path, picture: Path
) -> None:
    status, report, errors = verify(*exported(family, tmp_path, **experts), "--image", picture)
    assert status == 0, errors
    outputs = report["outputs"]
    assert outputs["equal"] and outputs["same_next_token"]
    assert outputs["num_prompts"] == 2
    names = [place["place"] for place in outputs["places"]]
    assert set(names) == {
        "image features", "token embeddings", "decoder layer 0", "decoder layer 1", "final norm", "logits"
    }  # fmt: skip
    assert all(place["max_difference"] < 1e-4 and place["largest"] > 0.1 for place in outputs["places"])


def test_a_changed_weight_shows_where_it_acts(tmp_path: Path, picture: Path) -> None:
    """A visual expert of the last layer: nothing before it differs, and text alone does not either."""
    weights, folder = exported("qwen3", tmp_path)
    (folder / "checksums.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.layers.1.mlp_ve.down_proj.weight"] *= 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, report, errors = verify(weights, folder, "--image", picture)
    assert status == 1, errors
    assert not report["equal"]
    differences = {place["place"]: place["max_difference"] for place in report["outputs"]["places"]}
    assert differences["decoder layer 0"] < 1e-4 < differences["decoder layer 1"]
    status, report, _ = verify(weights, folder)
    assert status == 1  # the bits differ
    assert report["outputs"]["equal"]


def test_what_cannot_run_is_one_line(tmp_path: Path) -> None:
    weights, folder = exported("qwen3", tmp_path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for words, expected in (
        ((weights, folder, "--image", broken), "cannot be read as a picture"),
        ((weights, folder, "--tokenizer", tmp_path / "nowhere"), "is missing"),
    ):
        status, _, errors = verify(*words)
        assert status == 2
        (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
        assert expected in line
