"""Which runs to buy for a budget of GPU-hours.

What is bought is a curve: one LLM with encoder sizes around the optimum expected there; and then the sizes between
them, which halve the grid's step. Every combination is tried. Criterion: the grid's part of the interval that
``recommend`` gives for the target LLM; of the plans that are next to narrowest the cheapest. Noise is not in it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from navil_megatron.config.errors import UserError
from navil_megatron.scaling.cost import CostAssumptions, run_hours
from navil_megatron.scaling.line import Line, grid_factor
from navil_megatron.scaling.sizes import format_size

COARSE, FINE = (-2.0, -1.0, 0.0, 1.0), (-0.5, 0.5, 1.5)
"""Doublings from the expected optimum: the paper's own choice for 1.8B, and the sizes around the optimum between them.
The rule needs an encoder of twice the size of each."""
MOST_LLMS = 8
NEXT_TO = 1.01  # a factor within 1% of the narrowest is as good
_HALF = math.log(2) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to plan for."""

    target: float  # LLM whose encoder is to be known
    budget: float
    llms: tuple[float, ...]  # LLM sizes that can be trained, ``MOST_LLMS`` at most
    samples: tuple[float, ...]  # amounts of data, any of them
    seeds: int = 1
    assumed: CostAssumptions = field(default_factory=CostAssumptions)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run to buy, with the names of a study's lines; the loss is what is missing."""

    llm_parameters: int
    encoder_parameters: int
    samples: int
    seed: int
    gpu_hours: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Runs to buy together."""

    samples: float
    runs: tuple[PlannedRun, ...]
    num_curves: int  # LLMs on the line, those measured before included
    factor: float  # by how much the recommendation is then off at most because of the grid

    @property
    def gpu_hours(self) -> float:
        """Of all runs."""
        return sum(run.gpu_hours for run in self.runs)


@dataclass(frozen=True, slots=True)
class Sweep:
    """The plan, and what was passed over for it."""

    plan: Plan
    also_at: tuple[float, ...]  # less data at which the same runs are evaluated on their way
    factor_before: float | None  # ``None`` without a study
    cheaper: tuple[Plan, ...]  # plans that cost less than all that are as narrow, cheapest first
    on_other_data: tuple[Plan, ...]  # what the budget buys at the other amounts of data


def plan_sweep(line: Line, wanted: Wanted, is_measured: bool) -> Sweep:
    """Chooses the runs, at the most data at which the budget buys a line of three LLMs.

    ``line``, of the study so far or the paper's, gives the encoder expected to be best; ``is_measured``: its own curves
    are there and need not be bought.

    Raises:
        UserError: The budget buys no line, or nothing that narrows the one that is there.
    """
    halves = {llm: max(half) for llm, half in zip(line.llms, line.halves, strict=True)} if is_measured else {}
    before = _factor(halves, wanted.target) if halves else None
    least = math.inf
    found: dict[float, list[Plan]] = {}
    for samples in sorted(wanted.samples, reverse=True):
        plans = [plan for plan in _plans(line, wanted, samples, halves) if before is None or plan.factor < before]
        least = min([least, *(plan.gpu_hours for plan in plans)])
        affordable = [plan for plan in plans if plan.gpu_hours <= wanted.budget]
        # Two points fit any line: a third shows whether there is one.
        affordable = [plan for plan in affordable if plan.num_curves > 2] or affordable
        if affordable:
            found[samples] = _up_to_best(affordable)
    if math.isinf(least):
        sizes = ", ".join(format_size(llm) for llm in wanted.llms)
        raise UserError(f"no runs of LLMs {sizes} narrow the interval; add other sizes to --llms")
    if not found:
        raise UserError(
            f"found a budget of {wanted.budget:g} GPU-hours, expected at least {least:,.1f}; raise --gpu-hours"
        )
    # Most data first.
    best = [plans[-1] for plans in found.values()]
    chosen = next((plan for plan in best if plan.num_curves > 2), best[0])
    also_at = tuple(amount for amount in sorted(wanted.samples) if amount < chosen.samples)
    others = tuple(plan for plan in best if plan is not chosen)
    return Sweep(chosen, also_at, before, tuple(found[chosen.samples][:-1]), others)


def _factor(halves: dict[float, float], target: float) -> float:
    return math.exp(grid_factor(list(halves), list(halves.values()), target))


def _plans(line: Line, wanted: Wanted, samples: float, halves: dict[float, float]) -> Iterator[Plan]:
    """Every combination of curves, coarse and fine, that gives a line."""
    llms = sorted({*wanted.llms, *halves})
    choices = [_choices(line, wanted, samples, llm, halves.get(llm)) for llm in llms]
    for chosen in product(*choices):
        owned = {llm: half for llm, (half, _) in zip(llms, chosen, strict=True) if half is not None}
        runs = tuple(run for _, bought in chosen for run in bought)
        if runs and len(owned) > 1:
            yield Plan(samples, runs, len(owned), _factor(owned, wanted.target))


def _choices(
    line: Line, wanted: Wanted, samples: float, llm: float, half: float | None
) -> list[tuple[float | None, tuple[PlannedRun, ...]]]:
    """What can be done for one LLM: half the step that its grid then has (``None``: no curve), and the runs."""
    centre = line.predict(llm) if half is None else line.encoders[line.llms.index(llm)]

    def runs(steps: tuple[float, ...]) -> tuple[PlannedRun, ...]:
        # Two digits: no shape hits a size more exactly.
        encoders = [float(f"{centre * 2**step:.2g}") for step in steps]
        return tuple(
            PlannedRun(round(llm), round(size), round(samples), seed, run_hours(llm, size, samples, wanted.assumed))
            for size in encoders
            for seed in range(wanted.seeds)
        )

    if half is None:
        return [(None, ()), (_HALF, runs(COARSE)), (_HALF / 2, runs(COARSE) + runs(FINE))]
    return [(half, ()), (_HALF / 2, runs(FINE))] if half > 0.9 * _HALF else [(half, ())]


def _up_to_best(plans: list[Plan]) -> list[Plan]:
    """Plans that are narrower than every cheaper one, up to the cheapest of those next to the narrowest."""
    kept: list[Plan] = []
    enough = min(plan.factor for plan in plans) * NEXT_TO
    for plan in sorted(plans, key=lambda plan: (plan.gpu_hours, plan.factor)):
        if not kept or plan.factor < kept[-1].factor / NEXT_TO or plan.factor <= enough:
            kept.append(plan)
        if plan.factor <= enough:
            break
    return kept
