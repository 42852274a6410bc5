"""Every choice of recompute has the same gradients and holds less than the one before, linear in tokens."""

import functools

import pytest

from navil_megatron.models.build import build_model
from navil_megatron.training.batch import build_model_inputs
from tests.held_memory import watching
from tests.oracle import MIXED, TEXT_ONLY, Outcome, compare, merge_sections, oracle_config, run_steps
from tests.ranks import run_ranks, start_session
from tests.tolerances import LINEAR_MEMORY, RANKS
from tools.bench.synthetic import synthetic_microbatch

CHOICES: dict[str, dict] = {
    "none": {},
    "attention": {"recompute": "selective"},
    "attention, mlp": {"recompute": "selective", "recompute_modules": ("attention", "mlp")},
    "all parts": {"recompute": "selective", "recompute_modules": ("attention", "mlp", "encoder")},
    "full": {"recompute": "full"},
}
"""From what holds most to what holds least."""

ALONE = {part: {"recompute": "selective", "recompute_modules": (part,)} for part in ("mlp", "encoder")}
PLACES = {
    "one-rank": (1, {}),
    "tp2-sp": (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "ep2": (2, {"parallel": {"ep": 2}, "optimizer": {"distributed": False}}),
}
BATCH = (MIXED, TEXT_ONLY)
SAMPLE = (9, ((4, 4),))


def steps_of_choices(rank: int, world_size: int, sections: dict, names: tuple[str, ...]) -> list[Outcome]:
    return [
        run_steps(rank, world_size, merge_sections(sections, {"training": {**CHOICES, **ALONE}[name]}), BATCH, 1)
        for name in names
    ]


@functools.cache
def without_recompute() -> Outcome:
    return run_ranks(1, steps_of_choices, {}, ("none",))[0][0]


@pytest.mark.parametrize("place", PLACES)
def test_every_choice_has_the_same_gradients(place: str) -> None:
    world_size, sections = PLACES[place]
    names = (*list(CHOICES)[1:], *ALONE)
    found = run_ranks(world_size, steps_of_choices, sections, names)
    for outcomes in zip(*found, strict=True):
        compare(list(outcomes), without_recompute(), **RANKS)


def held_bytes(rank: int, world_size: int, names: tuple[str, ...], num_samples: int) -> list[int]:
    """What a forward pass of each choice keeps for the backward pass, of a row of equal samples."""
    held = []
    for name in names:
        config = oracle_config(training={**CHOICES, **ALONE}[name])
        with start_session(rank, world_size, config) as session:
            (model,) = build_model(config, session.groups, session.device)
            row = synthetic_microbatch(config.model, 20 * num_samples, 1, [[SAMPLE] * num_samples], pad_segments_to=4)
            inputs = build_model_inputs(row)
            with watching(model.parameters()) as watched:
                losses = model(inputs)
            assert losses.requires_grad
            held.append(watched.num_bytes)
    return held


def test_each_choice_holds_less_than_the_one_before() -> None:
    (held,) = run_ranks(1, held_bytes, tuple(CHOICES), 16)
    assert held == sorted(set(held), reverse=True), dict(zip(CHOICES, held, strict=True))


@pytest.mark.parametrize("choice", ["none", "all parts", "full"])
def test_activations_are_linear_in_tokens(choice: str) -> None:
    ((few,), (some,), (many,)) = (run_ranks(1, held_bytes, (choice,), num)[0] for num in (16, 32, 64))
    assert abs(some - 2 * few) <= LINEAR_MEMORY * some
    assert abs(many - 2 * some) <= LINEAR_MEMORY * many


def test_the_encoder_follows_its_own_choice() -> None:
    (held,) = run_ranks(1, held_bytes, ("none", "encoder", "full"), 16)
    assert held == sorted(set(held), reverse=True)
