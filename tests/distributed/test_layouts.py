"""Every layout is the same model: losses, gradients, gradient norms and updated parameters equal one rank's."""

import functools

import pytest

from tests.oracle import IMAGE_ONLY, MIXED, TEXT_ONLY, TINY_IMAGE, Outcome, compare, merge_sections, run_steps
from tests.ranks import run_ranks
from tests.tolerances import RANKS

BATCH = (MIXED, TEXT_ONLY, IMAGE_ONLY, TINY_IMAGE)
TP2_SP = {"tp": 2, "sequence_parallel": True}
EP2 = {"ep": 2}
CP2 = {"cp": 2}
NOT_SPLIT = {"optimizer": {"distributed": False}}

LAYOUTS = {
    "tp2": (2, {"parallel": {"tp": 2}}),
    "tp2-sp": (2, {"parallel": TP2_SP}),
    "tp2-sp-full-recompute": (2, {"parallel": TP2_SP, "training": {"recompute": "full"}}),
    "tp2-sp-selective-recompute": (2, {"parallel": TP2_SP, "training": {"recompute": "selective"}}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "pp2-full-recompute": (2, {"parallel": {"pp": 2}, "training": {"recompute": "full"}}),
    "pp2-uneven": (2, {"parallel": {"pp": 2, "pipeline_layers": (1, 3)}}),
    "pp2-interleaved": (2, {"parallel": {"pp": 2, "vpp": 2}}),
    "dp2": (2, NOT_SPLIT),
    "dp2-distributed-optimizer": (2, {}),
    "dp4-distributed-optimizer": (4, {}),
    "tp2-sp-pp2": (4, {"parallel": {**TP2_SP, "pp": 2}}),
    "tp2-sp-pp2-interleaved": (4, {"parallel": {**TP2_SP, "pp": 2, "vpp": 2}}),
    "tp2-sp-dp2": (4, {"parallel": TP2_SP, **NOT_SPLIT}),
    "tp2-sp-dp2-distributed-optimizer": (4, {"parallel": TP2_SP}),
    "pp2-dp2": (4, {"parallel": {"pp": 2}, **NOT_SPLIT}),
    "pp2-dp2-distributed-optimizer": (4, {"parallel": {"pp": 2}}),
    "ep2": (2, {"parallel": EP2, **NOT_SPLIT}),
    "ep2-distributed-optimizer": (2, {"parallel": EP2}),
    "ep2-full-recompute": (2, {"parallel": EP2, "training": {"recompute": "full"}, **NOT_SPLIT}),
    "ep2-selective-recompute": (2, {"parallel": EP2, "training": {"recompute": "selective"}, **NOT_SPLIT}),
    "ep2-dp4": (4, {"parallel": EP2, **NOT_SPLIT}),
    "ep2-dp4-distributed-optimizer": (4, {"parallel": EP2}),
    "ep2-tp2-sp": (4, {"parallel": {**EP2, **TP2_SP}, **NOT_SPLIT}),
    "ep2-tp2-sp-distributed-optimizer": (4, {"parallel": {**EP2, **TP2_SP}}),
    "ep2-tp2-sp-full-recompute": (
        4,
        {"parallel": {**EP2, **TP2_SP}, "training": {"recompute": "full"}, **NOT_SPLIT},
    ),
    "ep2-pp2": (4, {"parallel": {**EP2, "pp": 2}, **NOT_SPLIT}),
    "ep2-pp2-distributed-optimizer": (4, {"parallel": {**EP2, "pp": 2}}),
    "ep2-pp2-interleaved-full-recompute": (
        4,
        {"parallel": {**EP2, "pp": 2, "vpp": 2}, "training": {"recompute": "full"}, **NOT_SPLIT},
    ),
    "cp2": (2, {"parallel": CP2, **NOT_SPLIT}),
    "cp2-distributed-optimizer": (2, {"parallel": CP2}),
    "cp2-full-recompute": (2, {"parallel": CP2, "training": {"recompute": "full"}, **NOT_SPLIT}),
    "cp2-selective-recompute": (2, {"parallel": CP2, "training": {"recompute": "selective"}, **NOT_SPLIT}),
    "cp2-dp2": (4, {"parallel": CP2, **NOT_SPLIT}),
    "cp2-dp2-distributed-optimizer": (4, {"parallel": CP2}),
    "cp2-pp2": (4, {"parallel": {**CP2, "pp": 2}, **NOT_SPLIT}),
    "cp2-pp2-interleaved": (4, {"parallel": {**CP2, "pp": 2, "vpp": 2}, **NOT_SPLIT}),
    "cp2-ep2": (2, {"parallel": {**CP2, **EP2}, **NOT_SPLIT}),
    "cp2-ep2-dp2-distributed-optimizer": (4, {"parallel": {**CP2, **EP2}}),
}
MODELS: dict[str, dict] = {
    "untied": {},
    "tied": {"language": {"tied_embeddings": True}},
    "composed": {"language": {"family": "internlm2", "qk_norm": False, "composed_visual_output_projection": True}},
    "qwen2": {"language": {"family": "qwen2", "qk_norm": False, "qkv_bias": True}},
    "tied llama": {
        "language": {
            "family": "llama",
            "qk_norm": False,
            "tied_embeddings": True,
            "head_dim": 12,
            "rope_scaling_factor": 8.0,
            "rope_original_length": 16,
        }
    },
    "four groups": {"language": {"num_query_groups": 4}},
    "577 words": {"language": {"num_query_groups": 4, "vocab_size": 577}},
    "577 words, tied": {"language": {"num_query_groups": 4, "vocab_size": 577, "tied_embeddings": True}},
    "shared attention": {"language": {"modality_experts": ("ffn",)}},
    "no experts": {"language": {"modality_experts": ()}},
    "windowed": {
        "vision": {"token_order": "window", "window_size": 4, "full_attention_layers": (1,), "qkv_bias": True}
    },
}
# Tensor and context parallelism share out whole groups of heads, so more of them takes more than the tiny model has.
LAYOUTS_OF_FOUR_GROUPS = {
    "tp4": (4, {"parallel": {"tp": 4}}),
    "tp4-sp": (4, {"parallel": {"tp": 4, "sequence_parallel": True}}),
    "cp4": (4, {"parallel": {"cp": 4}, **NOT_SPLIT}),
    "tp2-cp2": (4, {"parallel": {"tp": 2, **CP2}, **NOT_SPLIT}),
    "tp2-sp-cp2": (4, {"parallel": {**TP2_SP, **CP2}, **NOT_SPLIT}),
    "tp2-sp-cp2-distributed-optimizer": (4, {"parallel": {**TP2_SP, **CP2}}),
    "tp2-sp-cp2-ep2": (4, {"parallel": {**TP2_SP, **CP2, **EP2}, **NOT_SPLIT}),
}
ON_EVERY_MODEL = ("tp2-sp", "pp2", "tp2-sp-pp2", "cp2")
PHASES_AT = ("tp2-sp", "pp2-uneven", "dp2", "ep2", "ep2-distributed-optimizer", "cp2")


@functools.cache
def one_rank(model: str, phase: str) -> Outcome:
    (outcome,) = run_ranks(1, run_steps, _sections(model, phase), BATCH)
    return outcome


def _sections(model: str, phase: str) -> dict:
    return {"model": MODELS[model], "training": {"phase": phase}}


def check(layout: str, model: str = "untied", phase: str = "s2") -> None:
    world_size, sections = {**LAYOUTS, **LAYOUTS_OF_FOUR_GROUPS}[layout]
    found = run_ranks(world_size, run_steps, merge_sections(_sections(model, phase), sections), BATCH)
    compare(found, one_rank(model, phase), **RANKS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_rank(layout: str) -> None:
    check(layout)


@pytest.mark.parametrize("layout", LAYOUTS_OF_FOUR_GROUPS)
def test_layouts_that_need_four_groups_of_heads(layout: str) -> None:
    check(layout, model="four groups")


@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("untied", "four groups")])
@pytest.mark.parametrize("layout", ON_EVERY_MODEL)
def test_every_kind_of_model_at_the_main_layouts(layout: str, model: str) -> None:
    check(layout, model=model)


@pytest.mark.parametrize("phase", ["s1.1", "s1.2"])
@pytest.mark.parametrize("layout", PHASES_AT)
def test_phases_that_freeze_at_the_main_layouts(layout: str, phase: str) -> None:
    check(layout, phase=phase)


@pytest.mark.parametrize(("layout", "phase"), [("ep2", "s2"), ("tp2-sp", "s1.1"), ("tp2-sp", "s1.2")])
def test_biases_split_freeze_and_reduce_like_their_matrices(layout: str, phase: str) -> None:
    check(layout, model="qwen2", phase=phase)
