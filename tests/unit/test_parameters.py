"""The table of parameters alone: the paper's totals, each phase, parts, and what a rank holds."""

import dataclasses
from math import prod
from typing import Any

import pytest

from navil_megatron.blueprint.held_parameters import chunk_parameters
from navil_megatron.blueprint.parameters import (
    active_parameters,
    checkpoint_shapes,
    count_by_part,
    is_trainable,
    parameter_of,
    parameters,
)
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.hf.hf_parameters import hf_parameters
from tests.ranks import tiny_config
from tests.real_sizes import NAVIL_2B, NAVIL_9B


def tiny(vision: dict[str, Any] | None = None, **language: Any) -> ModelConfig:
    """The tiny model with some fields changed."""
    model = tiny_config().model
    return dataclasses.replace(
        model,
        language=dataclasses.replace(model.language, **language),
        vision=dataclasses.replace(model.vision, **(vision or {})),
    )


TIED = tiny(tied_embeddings=True)
QWEN2 = tiny({"norm": "layernorm", "qkv_bias": True}, family="qwen2", qk_norm=False, qkv_bias=True)
EXPERTS = tiny(num_experts=4, experts_per_token=2)
SHARED = tiny(modality_experts=())
MODELS = {"2B": NAVIL_2B, "9B": NAVIL_9B, "tied": TIED, "qwen2": QWEN2, "experts": EXPERTS, "shared": SHARED}


def held(model: ModelConfig, padding: bool = False, chunk: int = 0, **parallel: Any) -> dict[str, int]:
    """Names and numbers of everything that a rank of a chunk holds, without tensor parallelism."""
    return {
        piece.name: piece.parameter.numel if piece.parameter.is_vocabulary and not padding else piece.numel
        for piece in chunk_parameters(model, ParallelConfig(**parallel), chunk)
    }


def test_the_papers_totals() -> None:
    small = dataclasses.replace(NAVIL_2B, language=dataclasses.replace(NAVIL_2B.language, vocab_size=92_544))
    for model, total in ((small, 4_040_871_872), (NAVIL_2B, 4_040_921_024), (NAVIL_9B, 16_417_797_888)):
        assert sum(held(model).values()) == total


def test_rows_behind_the_words_are_held_and_not_counted() -> None:
    padding = sum(held(NAVIL_2B, padding=True).values()) - sum(held(NAVIL_2B).values())
    assert padding == 2 * (92_672 - 92_556) * NAVIL_2B.language.hidden_size
    parallel = ParallelConfig(tensor_model_parallel_size=8)
    shapes = {piece.name: piece.shape for piece in chunk_parameters(NAVIL_2B, parallel, 0)}
    assert shapes["embedding.word_embeddings.weight"] == shapes["output_layer.weight"] == (11_648, 2_048)
    assert checkpoint_shapes(NAVIL_2B)["output_layer.weight"] == (92_556, 2_048)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("phase", ["s1.1", "s1.2", "s2"])
def test_counts_are_those_of_what_a_rank_holds(model: ModelConfig, phase: str) -> None:
    expected = sum(
        numbers for name, numbers in held(model).items() if is_trainable(parameter_of(model, name).part, phase)
    )
    assert sum(count_by_part(model, phase).values()) == expected


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_hugging_face_files_hold_every_row_once(model: ModelConfig) -> None:
    rows = [found.parameter for found in hf_parameters(model)]
    assert len(rows) == len(parameters(model)) and {row.key: row for row in rows} == {
        row.key: row for row in parameters(model)
    }
    shapes = checkpoint_shapes(model)
    assert sum(map(prod, shapes.values())) == sum(row.numel for row in rows)


def test_shared_weights_are_counted_once_and_stored_twice() -> None:
    separate = tiny()
    stored, twins = checkpoint_shapes(SHARED), [row for row in parameters(SHARED) if row.is_shared]
    assert stored == checkpoint_shapes(separate)
    assert sum(held(separate).values()) - sum(held(SHARED).values()) == sum(row.numel for row in twins)
    assert twins and all(row.modality == "visual" and row.key.startswith("decoder.") for row in twins)


def test_a_token_meets_the_experts_that_are_chosen() -> None:
    assert active_parameters(TIED) == sum(held(TIED).values())
    one = 3 * EXPERTS.language.hidden_size * EXPERTS.language.ffn_hidden_size
    idle = 2 * 2 * EXPERTS.language.num_layers * one
    assert active_parameters(EXPERTS) == sum(held(EXPERTS).values()) - idle


def test_parts_cover_the_model() -> None:
    parts = count_by_part(NAVIL_2B)
    assert set(parts) == {
        "vision_encoder", "connector", "embedding", "special_token_embedding", "output_layer", "norms",
        "text attention", "text feed-forward", "visual attention", "visual feed-forward",
    }  # fmt: skip
    assert parts["text feed-forward"] == parts["visual feed-forward"] == 24 * 3 * 2048 * 8192
    assert parameter_of(NAVIL_2B, "decoder.layers.3.input_layernorm.weight").part == "norms"


def test_a_name_that_no_model_has_is_refused() -> None:
    with pytest.raises(KeyError, match=r"decoder\.layers\.self_attention\.linear_proj\.text\.bias"):
        parameter_of(NAVIL_2B, "decoder.layers.3.self_attention.linear_proj.text.bias")


def test_the_chunks_of_a_pipeline_hold_the_model_once() -> None:
    stages = {"pipeline_model_parallel_size": 2}
    chunks = [held(NAVIL_2B, chunk=chunk, **stages, pipeline_layers=(9, 15)) for chunk in (0, 1)]
    assert sum(sum(chunk.values()) for chunk in chunks) == 4_040_921_024
    # A tied head on another stage than the table is a copy of it.
    names = held(TIED, chunk=1, **stages)
    assert "output_layer.weight" in names and "output_layer.weight" not in held(TIED)
    assert parameter_of(TIED, "output_layer.weight").key == "embedding.word_embeddings.weight"
