"""The table against the authors' keys at real sizes, and bit-exact round trips of the golden folders."""

import json
from pathlib import Path

import pytest

from navil_megatron.config.schema import LanguageConfig, ModelConfig, VisionConfig
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.hf_config import model_config_from_hf
from navil_megatron.hf.ingest import convert_from_hf
from navil_megatron.hf.param_map import hf_shapes, mcore_shapes, table
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.sharded_checkpoint import read_whole_checkpoint
from navil_megatron.hf.verify import same_bits

LANGUAGE_2B = LanguageConfig(
    family="internlm2",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=16,
    num_query_groups=8,
    head_dim=128,
    vocab_size=92_556,
    qk_norm=False,
    composed_visual_output_projection=True,
)
LANGUAGE_9B = LanguageConfig(
    family="qwen3",
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12_288,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=151_936,
    qk_norm=True,
)
REAL_SIZES = {
    "keys_2b": (
        LANGUAGE_2B,
        VisionConfig(num_layers=24, hidden_size=1472, ffn_hidden_size=5888, num_attention_heads=23),
    ),
    "keys_9b": (
        LANGUAGE_9B,
        VisionConfig(num_layers=32, hidden_size=1792, ffn_hidden_size=7168, num_attention_heads=28),
    ),
    "keys_2b_released_guess": (
        LANGUAGE_2B,
        VisionConfig(
            num_layers=32,
            hidden_size=1280,
            ffn_hidden_size=5120,
            num_attention_heads=16,
            qkv_bias=True,
            norm="layernorm",
        ),
    ),
}


@pytest.mark.parametrize("name", REAL_SIZES)
def test_table_gives_every_real_key(golden_dir: Path, name: str) -> None:
    language, vision = REAL_SIZES[name]
    model = ModelConfig(language=language, vision=vision, special_token_ids=tuple(range(12)))
    expected = json.loads((golden_dir / f"{name}.json").read_text())["tensors"]
    assert {key: list(shape) for key, shape in hf_shapes(model).items()} == expected
    assert len(mcore_shapes(model)) == len(table(model))


@pytest.mark.parametrize("name", ["9b", "2b", "2b_win"])
def test_golden_folder_survives_a_round_trip_bit_for_bit(golden_dir: Path, tmp_path: Path, name: str) -> None:
    original = golden_dir / "public" / "models" / name
    ingested = convert_from_hf(original, tmp_path / "checkpoint")
    assert ingested["tokenizer"] is None
    assert "no tokenizer" in ingested["notes"][0]
    exported = convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf", max_part_bytes=300_000)
    assert len(exported["parts"]) > 3
    before, after = TensorFolder(original), TensorFolder(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    model, _ = read_whole_checkpoint(tmp_path / "checkpoint")
    assert model_config_from_hf(json.loads((tmp_path / "hf" / "config.json").read_text())) == model
