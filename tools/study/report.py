"""Table, picture and verdict of one study, from the results of its runs.

Runs see slightly different numbers of samples in a step, so losses are compared at common numbers of samples, read off
each run's evaluations by straight lines in log samples.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from rich.console import Console
from scipy.stats import ttest_ind

from navil_megatron.scaling.load import load_study
from navil_megatron.scaling.picture import draw_study
from navil_megatron.scaling.recommend import find_optima
from navil_megatron.scaling.report import optima_lines
from tools.study.arms import Arm, Study
from tools.study.one_run import RESULT
from tools.study.picture import draw_curves, draw_shapes

COLUMNS = 4
"""Numbers of samples that a table compares at, from the first evaluation to the last."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Runs:
    """The runs of one arm."""

    arm: Arm
    results: list[dict]

    def losses(self, at: float) -> list[float]:
        """One for each seed, after so many samples."""
        found = []
        for result in self.results:
            seen, losses = zip(*((point["samples"], point["loss"]) for point in result["points"]), strict=True)
            found.append(float(np.interp(np.log(at), np.log(seen), losses)))
        return found

    def last(self) -> float:
        """The most that every seed saw."""
        return min(result["points"][-1]["samples"] for result in self.results)

    def first(self) -> float:
        """The samples by which every seed was measured once."""
        return max(result["points"][0]["samples"] for result in self.results)

    def needed(self, loss: float) -> float | None:
        """Samples after which the mean is at or below a loss for the first time; None: never."""
        grid = np.geomspace(self.first(), self.last(), 400)
        return next((float(at) for at in grid if fmean(self.losses(at)) <= loss), None)


def write_report(
    letter: str,
    study: Study,
    folder: Path,
    seeds: int,
    rates: dict[float, float | None],
    docs: Path | None,
    console: Console,
) -> None:
    """Prints the study and draws it; with ``docs`` also into ``docs/study.md`` between this study's marks."""
    arms = {label: at_best_rate(folder, arm, seeds, rates.values()) for label, arm in study.arms.items()}
    missing = sum(seeds - len(runs.results) for runs in arms.values())
    arms = {label: runs for label, runs in arms.items() if runs.results}
    console.rule(f"{letter}  {study.title}")
    if missing:
        console.print(f"[yellow]{missing} of {seeds * len(study.arms)} runs are missing[/yellow]")
    if not arms:
        return
    target = (docs or folder / "report") / "study"
    target.mkdir(parents=True, exist_ok=True)
    first, last = max(runs.first() for runs in arms.values()), min(runs.last() for runs in arms.values())
    grid = [_round(at) for at in np.geomspace(first, last, COLUMNS)]
    if letter == "d":
        found = encoder_sizes(arms, grid, target)
    else:
        draw = draw_shapes if letter == "c" else draw_curves
        draw(arms, grid, target / f"{letter}.svg")
        found = [f"- {line}" for line in verdicts(arms, study.preferred, grid)]
    if letter == "b":
        found += ["", *feature_scales(arms)]
    if len(rates) > 1:
        found += ["", chosen_rates(arms, rates)]
    text = "\n".join([*table(arms, grid), "", *found])
    if docs is not None:
        _insert(docs / "study.md", letter, f"{text}\n\n![{study.title}](study/{letter}.svg)")
    console.print(text, markup=False, soft_wrap=True)


def at_best_rate(folder: Path, arm: Arm, seeds: int, rates: Iterable[float | None]) -> Runs:
    """An arm's runs at the learning rate with the lowest mean of last losses, of those with the most seeds done."""
    arms = [replace(arm, rate=rate) for rate in rates]
    tried = [Runs(one, _results(folder, one, seeds)) for one in arms]
    most = max(len(runs.results) for runs in tried)
    whole = [runs for runs in tried if len(runs.results) == most]
    return min(whole, key=lambda runs: fmean(runs.losses(runs.last()))) if most else whole[0]


def _results(folder: Path, arm: Arm, seeds: int) -> list[dict]:
    files = [folder / "runs" / f"{arm.name}_seed{seed}" / RESULT for seed in range(1, seeds + 1)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def _round(number: float) -> int:
    """Two digits."""
    return int(float(f"{number:.2g}"))


def table(arms: dict[str, Runs], grid: list[int]) -> list[str]:
    """Held-out loss, mean and standard deviation over the seeds, as Markdown."""
    lines = [
        "| | encoder | seeds | " + " | ".join(f"{at:,} samples" for at in grid) + " |",
        "|---|---|---|" + "---|" * len(grid),
    ]
    for label, runs in arms.items():
        cells = [_cell(runs.losses(at)) for at in grid]
        size = runs.results[0]["encoder_parameters"]
        lines.append(f"| {label} | {size / 1e3:.0f}k | {len(runs.results)} | " + " | ".join(cells) + " |")
    return lines


def _cell(losses: list[float]) -> str:
    return f"{fmean(losses):.3f} ± {stdev(losses):.3f}" if len(losses) > 1 else f"{losses[0]:.3f}"


def verdicts(arms: dict[str, Runs], preferred: str, grid: list[int]) -> list[str]:
    """The others against the preferred arm, early and late: Welch's t-test over the seeds."""
    if preferred not in arms:
        return []
    lines = []
    for other in (label for label in arms if label != preferred):
        pair = {preferred: arms[preferred], other: arms[other]}
        early, late = _compare(pair, grid[0]), _compare(pair, grid[-1])
        lines.append(f"{early.words}; {late.words}.{_data_saved(pair, grid[-1]) if late.differ else ''}")
    return lines


@dataclass(frozen=True)
class _Comparison:
    words: str
    differ: bool
    """Whether by more than chance."""


def _compare(pair: dict[str, Runs], at: int) -> _Comparison:
    (name, mine), (other, theirs) = ((label, runs.losses(at)) for label, runs in pair.items())
    if min(len(mine), len(theirs)) < 2:
        return _Comparison(f"at {at:,} samples {name} {fmean(mine):.3f}, {other} {fmean(theirs):.3f} (one seed)", False)
    chance = float(ttest_ind(mine, theirs, equal_var=False).pvalue)
    share = abs(fmean(mine) / fmean(theirs) - 1)
    if chance >= SIGNIFICANT:
        apart = f"({share:.0%} apart, p = {chance:.2f})"
        return _Comparison(f"at {at:,} samples {name} and {other} cannot be told apart {apart}", False)
    word = "below" if fmean(mine) < fmean(theirs) else "above"
    return _Comparison(f"at {at:,} samples {name} is {share:.0%} {word} {other} (p = {chance:.2g})", True)


def _data_saved(pair: dict[str, Runs], at: int) -> str:
    """How much less data the better of two needs for the last loss of the worse."""
    better, worse = sorted(pair, key=lambda label: fmean(pair[label].losses(at)))
    needed = pair[better].needed(fmean(pair[worse].losses(at)))
    return f" {better} reaches the last loss of {worse} with {needed / at:.2f} of the data." if needed else ""


def chosen_rates(arms: dict[str, Runs], rates: dict[float, float | None]) -> str:
    """At which learning rate each arm is shown."""
    names = {of_arm: rate for rate, of_arm in rates.items()}
    shown = ", ".join(f"{label} {names[runs.arm.rate]:g}" for label, runs in arms.items())
    return f"Learning rates, for each arm the best of {', '.join(f'{rate:g}' for rate in rates)}: {shown}."


def feature_scales(arms: dict[str, Runs]) -> list[str]:
    """How much larger visual features are than text features at the end, layer by layer, as Markdown."""
    layers = range(len(next(iter(arms.values())).results[0]["visual_over_text"]))
    names = ["entering the decoder", *(f"leaving layer {layer}" for layer in layers[1:])]
    lines = ["| visual over text, RMS | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for label, runs in arms.items():
        cells = [_cell([result["visual_over_text"][layer] for result in runs.results]) for layer in layers]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def encoder_sizes(arms: dict[str, Runs], grid: list[int], target: Path) -> list[str]:
    """The lines of ``docs/scaling.md``, and what ``navil-megatron scaling`` draws and says of them."""
    lines = [
        {
            "llm_parameters": result["llm_parameters"],
            "encoder_parameters": result["encoder_parameters"],
            "samples": at,
            "validation_loss": round(loss, 5),
            "seed": result["seed"],
            "depth": runs.arm.depth,
            "width": runs.arm.width,
            "heads": runs.arm.heads,
        }
        for runs in arms.values()
        for at in grid
        for result, loss in zip(runs.results, runs.losses(at), strict=True)
    ]
    file = target / "d.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    optima = find_optima(load_study(file))
    draw_study(optima, target / "d.svg")
    return ["```", *optima_lines(optima), "```"]


def _insert(page: Path, letter: str, text: str) -> None:
    """Replaces what stands between the marks of a study."""
    begin, end = f"<!-- {letter}: written by tools/study/run.py -->", f"<!-- end of {letter} -->"
    whole = page.read_text()
    before, rest = whole.split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
