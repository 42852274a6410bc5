"""The table against the authors' keys at real sizes, and bit-exact round trips of the golden folders."""

import dataclasses
import json
from pathlib import Path

import pytest

from navil_megatron.blueprint.parameters import checkpoint_shapes
from navil_megatron.config.vision import VisionConfig
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.hf_config import model_config_from_hf
from navil_megatron.hf.hf_parameters import hf_parameters, hf_shapes
from navil_megatron.hf.ingest import convert_from_hf
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.verify import same_bits
from tests.real_sizes import NAVIL_2B, NAVIL_9B
from tests.whole_checkpoint import read_whole_checkpoint

RELEASED_ENCODER = VisionConfig(
    num_layers=32, hidden_size=1280, ffn_hidden_size=5120, num_attention_heads=16, qkv_bias=True, norm="layernorm"
)
REAL_SIZES = {
    "keys_2b": NAVIL_2B,
    "keys_9b": NAVIL_9B,
    "keys_2b_released_guess": dataclasses.replace(NAVIL_2B, vision=RELEASED_ENCODER),
}


@pytest.mark.parametrize("name", REAL_SIZES)
def test_table_gives_every_real_key(golden_dir: Path, name: str) -> None:
    model = REAL_SIZES[name]
    expected = json.loads((golden_dir / f"{name}.json").read_text())["tensors"]
    assert {key: list(shape) for key, shape in hf_shapes(model).items()} == expected
    assert len(checkpoint_shapes(model)) == len(hf_parameters(model))


@pytest.mark.parametrize("name", ["9b", "2b", "2b_win"])
def test_golden_folder_survives_a_round_trip_bit_for_bit(golden_dir: Path, tmp_path: Path, name: str) -> None:
    original = golden_dir / "public" / "models" / name
    ingested = convert_from_hf(original, tmp_path / "checkpoint")
    assert ingested["tokenizer"] is None
    assert "no tokenizer" in ingested["notes"][0]
    exported = convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf", max_file_bytes=300_000)
    assert len(exported["files"]) > 3
    before, after = TensorFolder(original), TensorFolder(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    model, _ = read_whole_checkpoint(tmp_path / "checkpoint")
    assert model_config_from_hf(json.loads((tmp_path / "hf" / "config.json").read_text())) == model
