"""Which parameters each phase trains, at the real sizes."""

import json
from math import prod
from pathlib import Path

import pytest

from navil_megatron.blueprint.parameters import checkpoint_shapes, count_by_part, is_trainable, parameter_of
from navil_megatron.config.model import ModelConfig
from tests.real_sizes import NAVIL_2B, NAVIL_9B
from tests.unit.test_parameters import QWEN2


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
    assert round(sum(count_by_part(model, phase).values()) / 1e9, 2) == billions


@pytest.mark.parametrize(("phase", "text"), [("s1.1", False), ("s1.2", True), ("s2", True)])
def test_biases_are_trained_with_their_matrices(phase: str, text: bool) -> None:
    linear = "decoder.layers.0.self_attention.linear_qkv"
    assert is_trainable(parameter_of(QWEN2, f"{linear}.visual.bias").part, phase)
    assert is_trainable(parameter_of(QWEN2, f"{linear}.text.bias").part, phase) is text


def test_all_parameters_are_counted_exactly() -> None:
    assert sum(map(prod, checkpoint_shapes(NAVIL_2B).values())) == 4_040_921_024
    assert sum(map(prod, checkpoint_shapes(NAVIL_9B).values())) == 16_417_797_888


def test_the_real_key_lists_hold_as_many(golden_dir: Path) -> None:
    listed = json.loads((golden_dir / "keys_9b.json").read_text())
    assert "16417797888" in json.dumps(listed)
