"""The table of parameters is the built model: every family and option, and every way of laying it over ranks.

What is expected here is read off the built modules, core's marks on their weights and their sharded state, so the table
cannot vouch for itself.
"""

from typing import Any, NamedTuple

import pytest
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import device

from navil_megatron.blueprint.held_parameters import HeldParameter, chunk_parameters, is_routed
from navil_megatron.blueprint.parameters import checkpoint_shapes, parameter_of
from navil_megatron.checkpoint.sharded import model_state
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import model_problems
from navil_megatron.models.build import build_model
from navil_megatron.runtime.meta_rank import meta_rank
from tests.oracle import oracle_config
from tests.ranks import run_ranks

WINDOWED = {"token_order": "window", "window_size": 4, "full_attention_layers": (1,)}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3": {},
    "qwen2": {"language": {"family": "qwen2", "qk_norm": False, "qkv_bias": True}},
    "llama": {"language": {"family": "llama", "qk_norm": False}},
    "internlm2": {"language": {"family": "internlm2", "qk_norm": False}},
    "composed": {"language": {"family": "internlm2", "qk_norm": False, "composed_visual_output_projection": True}},
    "tied": {"language": {"tied_embeddings": True}},
    "experts": {"language": {"num_experts": 4, "experts_per_token": 2}},
    "shared": {"language": {"modality_experts": ()}},
    "shared attention": {"language": {"modality_experts": ("ffn",)}},
    "shared feed-forward": {"language": {"modality_experts": ("attention",)}},
    "layernorm": {"vision": {"norm": "layernorm", "qkv_bias": True}},
    "windowed": {"vision": WINDOWED},
    "no encoder": {"vision": {"num_layers": 0}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tp": 2},
    "sequence": {"tp": 2, "sequence_parallel": True},
    "uneven stages": {"pp": 2, "pipeline_layers": (1, 3)},
    "interleaved": {"pp": 2, "vpp": 2},
    "expert": {"ep": 2},
    "expert and tensor": {"ep": 2, "tp": 2, "sequence_parallel": True},
    "whole experts": {"ep": 2, "tp": 2, "etp": 1, "sequence_parallel": True},
}
LAID_OUT = ("qwen2", "composed", "tied", "experts", "shared attention")
"""Models that are tried at every layout that they may have."""


class Seen(NamedTuple):
    """What is known of a parameter on a rank."""

    name: str
    shape: tuple[int, ...]
    split: tuple[int, int] | None
    used_on: str | None
    is_experts_own: bool
    part: str
    first_values: tuple[float, float]


def of_model(name: str, parameter: Any, config: NaViLConfig) -> Seen:
    """By the built module: core's marks, and the rules of the reference by name."""
    is_split = getattr(parameter, "tensor_model_parallel", False)
    used_on = "tokens" if getattr(parameter, "sequence_parallel", False) else None
    if "q_layernorm" in name or "k_layernorm" in name:  # core sums these over the ranks by their names
        used_on = "heads"
    if getattr(parameter, "sum_gradient_over_tensor_parallel", False):
        used_on = "images"
    return Seen(
        name,
        tuple(parameter.shape),
        (parameter.partition_dim, parameter.partition_stride) if is_split else None,
        used_on,
        not getattr(parameter, "allreduce", True),
        part_by_name(name, config),
        first_values_by_name(name, parameter.dim(), config),
    )


def of_table(piece: HeldParameter, config: NaViLConfig) -> Seen:
    """By the table."""
    row, parallel = piece.parameter, config.parallel
    return Seen(
        piece.name,
        piece.shape,
        None if row.split_dim is None else (row.split_dim, row.split_blocks),
        None if row.used_on == "tokens" and not parallel.sequence_parallel else row.used_on,
        row.num_experts is not None and is_routed(config.model, parallel),
        row.part,
        (row.mean, row.std),
    )


def part_by_name(name: str, config: NaViLConfig) -> str:
    """The part that reports name."""
    if not name.startswith("decoder."):
        is_copy = name == "output_layer.weight" and config.model.language.tied_embeddings
        return "embedding" if is_copy else name.split(".")[0]
    for modality in ("text", "visual"):
        if f".{modality}." in name:
            return f"{modality} {'attention' if '.self_attention.' in name else 'feed-forward'}"
    return "norms"


def first_values_by_name(name: str, num_dims: int, config: NaViLConfig) -> tuple[float, float]:
    """Mean and deviation as the reference draws them: matrices and embeddings N(0, std), norms 1, biases 0."""
    leaf = name.rpartition(".")[2]
    if leaf.startswith("layer_scale"):
        return config.model.vision.layer_scale_init, 0.0
    if leaf == "bias" or num_dims == 1:
        return float(leaf != "bias"), 0.0
    of_encoder = name.startswith(("vision_encoder.", "connector."))
    return 0.0, config.model.vision.init_std if of_encoder else config.model.language.init_std


def compare(_rank: int, _world_size: int, configs: list[NaViLConfig]) -> list[str]:
    """In a process of its own: fake groups and the CPU form of core do not leak into other tests."""
    problems = []
    for config in configs:
        parallel, gpus = config.parallel, 4
        stages, stored = parallel.pipeline_model_parallel_size, {}
        for stage in range(stages):
            for expert in range(parallel.expert_model_parallel_size):
                rank = stage * (gpus // stages) + expert * parallel.expert_tensor_size
                with meta_rank(parallel, rank, gpus) as groups:
                    chunks = build_model(config, groups, device("cpu"))
                    state = model_state(chunks)
                    apply_factories(state)
                    shards = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
                    stored |= {entry.key: tuple(entry.global_shape) for entry in shards}
                    for number, chunk in enumerate(chunks):
                        built = [of_model(name, p, config) for name, p in chunk.named_parameters()]
                        rows = chunk_parameters(config.model, parallel, number * stages + stage, expert)
                        planned = [of_table(piece, config) for piece in rows]
                        for piece in built:
                            parameter_of(config.model, piece.name)  # every name is found
                        if built != planned:
                            pairs = [pair for pair in zip(built, planned, strict=False) if pair[0] != pair[1]]
                            problems.append(f"{config.model.language}, {parallel}: {pairs[:2]}")
        if stored != checkpoint_shapes(config.model):
            problems.append(
                f"{config.model.language}, {parallel}: {stored.items() ^ checkpoint_shapes(config.model).items()}"
            )
    return problems


def with_init(sections: dict[str, dict[str, Any]], parallel: dict[str, Any]) -> NaViLConfig:
    """A config whose encoder and decoder are drawn differently."""
    vision = {"init_std": 0.03, "layer_scale_init": 0.2, **sections.get("vision", {})}
    return oracle_config(model={**sections, "vision": vision}, parallel=parallel)


def test_every_model_is_built_as_the_table_says() -> None:
    configs = [with_init(sections, {}) for sections in MODELS.values()]
    for config in configs:
        assert list(model_problems(config.model)) == []
    (problems,) = run_ranks(1, compare, configs, timeout=300)
    assert problems == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_what_the_table_says(layout: str) -> None:
    configs = [with_init(MODELS[name], LAYOUTS[layout]) for name in LAID_OUT]
    (problems,) = run_ranks(1, compare, configs, timeout=300)
    assert problems == []
