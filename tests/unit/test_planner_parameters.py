"""Parameter counts from the config alone: the paper's totals, each phase, and the same names as the checkpoint's."""

import dataclasses
from math import prod

import pytest

from navil_megatron.blueprint.parameters import active_parameters, chunk_parameters, count_by_part, part_of, whole_model
from navil_megatron.blueprint.phases import is_trainable
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.hf.param_map import mcore_shapes
from tests.ranks import tiny_config
from tests.real_sizes import NAVIL_2B, NAVIL_9B

TIED = dataclasses.replace(
    tiny_config().model, language=dataclasses.replace(tiny_config().model.language, tied_embeddings=True)
)
QWEN2 = dataclasses.replace(
    tiny_config().model,
    language=dataclasses.replace(tiny_config().model.language, family="qwen2", qk_norm=False, qkv_bias=True),
    vision=dataclasses.replace(tiny_config().model.vision, norm="layernorm", qkv_bias=True),
)
EXPERTS = dataclasses.replace(
    tiny_config().model,
    language=dataclasses.replace(tiny_config().model.language, num_experts=4, experts_per_token=2),
)
MODELS = {"2B": NAVIL_2B, "9B": NAVIL_9B, "tied": TIED, "qwen2": QWEN2, "experts": EXPERTS}


def test_the_papers_totals() -> None:
    small = dataclasses.replace(NAVIL_2B, language=dataclasses.replace(NAVIL_2B.language, vocab_size=92_544))
    assert sum(whole_model(small).values()) == 4_040_871_872
    assert sum(whole_model(NAVIL_2B).values()) == 4_040_921_024
    assert sum(whole_model(NAVIL_9B).values()) == 16_417_797_888


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("phase", ["s1.1", "s1.2", "s2"])
def test_counts_equal_the_table_of_the_checkpoint(model: ModelConfig, phase: str) -> None:
    table = mcore_shapes(model).items()
    expected = sum(prod(shape) for key, shape in table if is_trainable(key.replace("layers.", "layers.0.", 1), phase))
    assert sum(count_by_part(model, phase).values()) == expected


def test_a_token_meets_the_experts_that_are_chosen() -> None:
    assert active_parameters(TIED) == sum(whole_model(TIED).values())
    one = 3 * EXPERTS.language.hidden_size * EXPERTS.language.ffn_hidden_size
    idle = 2 * 2 * EXPERTS.language.num_layers * one
    assert active_parameters(EXPERTS) == sum(whole_model(EXPERTS).values()) - idle


def test_parts_cover_the_model() -> None:
    parts = count_by_part(NAVIL_2B)
    assert set(parts) == {
        "vision_encoder", "connector", "embedding", "special_token_embedding", "output_layer", "norms",
        "text attention", "text feed-forward", "visual attention", "visual feed-forward",
    }  # fmt: skip
    assert parts["text feed-forward"] == parts["visual feed-forward"] == 24 * 3 * 2048 * 8192
    assert part_of("decoder.layers.3.input_layernorm.weight") == "norms"


def test_the_chunks_of_a_pipeline_hold_the_model_once() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=(9, 15))
    stages = [sum(numbers for _, numbers in chunk_parameters(NAVIL_2B, parallel, chunk)) for chunk in (0, 1)]
    assert sum(stages) == 4_040_921_024
    # A tied head on another stage than the table is a copy of it.
    tied = dict(chunk_parameters(TIED, ParallelConfig(pipeline_model_parallel_size=2), 1))
    assert "output_layer.weight" in tied and "output_layer.weight" not in whole_model(TIED)
