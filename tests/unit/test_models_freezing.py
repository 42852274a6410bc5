"""Which parameters each phase trains, at the real sizes: the counts of the specification, section 2.2."""

import json
from pathlib import Path

import pytest

from navil_megatron.config.schema import LanguageConfig, ModelConfig, VisionConfig
from navil_megatron.hf.param_map import mcore_shapes
from navil_megatron.models.freezing import is_trainable

NAVIL_2B = ModelConfig(
    language=LanguageConfig(
        family="internlm2",
        num_layers=24,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=16,
        num_query_groups=8,
        head_dim=128,
        vocab_size=92_544,
        qk_norm=False,
        composed_visual_output_projection=True,
    ),
    vision=VisionConfig(num_layers=24, hidden_size=1472, ffn_hidden_size=5888, num_attention_heads=23),
    special_token_ids=tuple(range(92_532, 92_544)),
)
NAVIL_9B = ModelConfig(
    language=LanguageConfig(
        family="qwen3",
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12_288,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=151_936,
        qk_norm=True,
    ),
    vision=VisionConfig(num_layers=32, hidden_size=1792, ffn_hidden_size=7168, num_attention_heads=28),
    special_token_ids=tuple(range(151_924, 151_936)),
)


def count(model: ModelConfig, phase: str) -> int:
    total = 0
    for key, shape in mcore_shapes(model).items():
        size = 1
        for length in shape:
            size *= length
        total += size if is_trainable(key.replace("layers.", "layers.0.", 1), phase) else 0
    return total


@pytest.mark.parametrize(
    ("model", "phase", "billions"),
    [
        (NAVIL_2B, "s1.1", 2.15),
        (NAVIL_2B, "s1.2", 2.45),
        (NAVIL_2B, "s2", 4.04),
        (NAVIL_9B, "s1.1", 8.23),
        (NAVIL_9B, "s1.2", 9.74),
        (NAVIL_9B, "s2", 16.42),
    ],
)
def test_trainable_parameters_of_each_phase(model: ModelConfig, phase: str, billions: float) -> None:
    assert round(count(model, phase) / 1e9, 2) == billions


def test_all_parameters_are_counted_exactly() -> None:
    assert count(NAVIL_2B, "s2") == 4_040_871_872
    assert count(NAVIL_9B, "s2") == 16_417_797_888


def test_the_real_key_lists_hold_as_many(golden_dir: Path) -> None:
    listed = json.loads((golden_dir / "keys_9b.json").read_text())
    assert "16417797888" in json.dumps(listed)
