"""``navil-megatron scaling``: fit, recommend, plan-sweep, plot."""

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path

from navil_megatron.config.errors import UserError
from navil_megatron.scaling.load import load_study
from navil_megatron.scaling.sizes import data_size, model_size
from navil_megatron.verbs.arguments import (
    choice,
    chosen,
    count,
    count_from_0,
    positive,
    require_picture_name,
    share,
    value,
)
from navil_megatron.verbs.verb import Extra, Outcome, verb


def _size(parse: Callable[[object], float]) -> Callable[[str], float]:
    """A size as an argument: argparse keeps the message of its own errors alone."""

    def size(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None

    return size


_PACKAGES = Extra("study", ("scipy", "matplotlib"))
_LLMS = [0.5e9, 1e9, 1.8e9, 4e9, 7e9]
_MODEL, _DATA = _size(model_size), _size(data_size)
_STUDY = (
    value("results", "RESULTS", "a study's JSON lines, or curves like the paper's (the paper's own)", nargs="?"),
    value("--curves", "FILE", "the same, as an option"),
)
_RULE = (
    value("--data", "N", "samples or tokens at which to compare (the most there is)", _DATA),
    value("--threshold", "SHARE", "of the rule (0.01)", share, default=0.01),
    value("--seed", "N", "of the draws of noise (0)", count_from_0, default=0),
)


@verb(
    "scaling fit",
    "fit the loss as a function of LLM size, encoder size and data, with intervals",
    "navil-megatron scaling fit results.jsonl --data 120M",
    *_STUDY,
    choice("--form", ("log-linear", "power", "power-irreducible"), "one law (all that can be)"),
    value("--llm", "SIZE", "fit the runs of this LLM alone", _MODEL),
    value("--encoder", "SIZE", "fit the runs of this encoder alone", _MODEL),
    value("--data", "N", "fit the runs at this amount of data alone", _DATA),
    value("--seed", "N", "of the bootstrap (0)", count_from_0, default=0),
    needs=_PACKAGES,
)
def fit(options: Namespace) -> Outcome:
    """Fits every law that the points are enough for."""
    from navil_megatron.scaling.fit import choose_points, fit_law
    from navil_megatron.scaling.laws import LAWS
    from navil_megatron.scaling.report import fit_json, fit_text

    study = load_study(_study_file(options))
    held = {axis: size for axis, size in chosen(options, "llm", "encoder", "data").items() if size is not None}
    points = choose_points(study, held)
    fits, refused = {}, {}
    for name in [options.form] if options.form else LAWS:
        try:
            fits[name] = fit_law(name, points, options.seed)
        except UserError as error:
            refused[name] = str(error)
    if not fits:
        raise UserError("; ".join(refused.values()))
    report = fit_json(study, points, fits, refused, held)
    return Outcome(report, fit_text(report))


@verb(
    "scaling recommend",
    "the visual encoder for an LLM, by the paper's 1% rule: parameters, depth, width, heads, interval",
    "navil-megatron scaling recommend --llm 8B\n"
    "  navil-megatron scaling recommend --curves results.jsonl --llm 1.8B --json",
    *_STUDY,
    value("--llm", "SIZE", "parameters: 8B, 500M, 1.8e9", _MODEL, required=True),
    *_RULE,
    needs=_PACKAGES,
)
def recommend(options: Namespace) -> Outcome:
    """The encoder for an LLM."""
    from navil_megatron.scaling.recommend import find_optima, recommend
    from navil_megatron.scaling.report import recommendation_json, recommendation_text

    optima = find_optima(load_study(_study_file(options)), **chosen(options, "threshold", "data", "seed", "llm"))
    advice = recommend(optima, options.llm)
    return Outcome(recommendation_json(optima, advice), recommendation_text(optima, advice))


@verb(
    "scaling plan-sweep",
    "which runs to buy for a budget of GPU-hours; with a study's results, in addition to them",
    "navil-megatron scaling plan-sweep --llm 8B --gpu-hours 20000 --output runs.jsonl",
    *_STUDY,
    value("--llm", "SIZE", "LLM whose encoder is to be known", _MODEL, required=True),
    value("--gpu-hours", "HOURS", "the budget", positive, required=True),
    value("--llms", "SIZE", "that can be trained (0.5B 1B 1.8B 4B 7B)", _MODEL, nargs="+", default=_LLMS),
    value("--samples", "N", "amounts of data (30M 60M 120M)", _DATA, nargs="+", default=[30e6, 60e6, 120e6]),
    value("--seeds", "N", "runs of each size (1)", count, default=1),
    value("--tflops", "TFLOP/s", "peak of a GPU (989)", positive, default=989.0),
    value("--mfu", "SHARE", "of the peak that is reached (0.4)", share, default=0.4),
    value("--visual-tokens", "N", "of a sample (256)", count, default=256),
    value("--text-tokens", "N", "of a sample (64)", count, default=64),
    value("--output", "FILE.jsonl", "write the runs, one a line"),
    needs=_PACKAGES,
)
def plan_sweep(options: Namespace) -> Outcome:
    """Chooses the runs, and writes them if asked."""
    from navil_megatron.scaling.cost import CostAssumptions
    from navil_megatron.scaling.recommend import find_optima
    from navil_megatron.scaling.report import sweep_json, sweep_text
    from navil_megatron.scaling.sweep import MOST_LLMS, Wanted, plan_sweep

    file = _study_file(options)
    optima = find_optima(load_study(file))
    if optima.line is None:
        raise UserError(f"{file} has fewer than 2 optima inside their curves; plan from the paper's, without a study")
    llms = tuple(sorted(set(options.llms)))
    if not (2 if file is None else 1) <= len(llms) <= MOST_LLMS:
        raise UserError(f"found {len(llms)} sizes in --llms, expected 2 to {MOST_LLMS}: a line needs two")
    wanted = Wanted(
        target=options.llm,
        budget=options.gpu_hours,
        llms=llms,
        samples=tuple(options.samples),
        seeds=options.seeds,
        assumed=CostAssumptions(**chosen(options, "tflops", "mfu", "visual_tokens", "text_tokens")),
    )
    sweep = plan_sweep(optima.line, wanted, is_measured=file is not None)
    name = f"the results of {file}" if file else "nothing yet; optima expected where the paper has them"
    report = sweep_json(name, sweep, wanted)
    if options.output is not None:
        options.output.write_text("".join(json.dumps(run) + "\n" for run in report["runs"]), "utf-8")
    return Outcome(report, sweep_text(report))


@verb(
    "scaling plot",
    "draw the loss over encoder sizes with the optima, and their line with its interval",
    "navil-megatron scaling plot results.jsonl --output study.svg --llm 8B",
    *_STUDY,
    value("--output", "FILE", "picture to write, .svg or .png", required=True),
    value("--llm", "SIZE", "mark this LLM on the line", _MODEL),
    *_RULE,
    needs=_PACKAGES,
)
def plot(options: Namespace) -> Outcome:
    """Draws the study."""
    require_picture_name(options.output)
    from navil_megatron.scaling.picture import draw_study
    from navil_megatron.scaling.recommend import find_optima
    from navil_megatron.scaling.report import optima_json, optima_lines

    optima = find_optima(load_study(_study_file(options)), **chosen(options, "threshold", "data", "seed"))
    draw_study(optima, options.output, options.llm)
    report = {"study": optima.study.name, "output": str(options.output), **optima_json(optima)}
    report["warnings"] = list(optima.warnings)
    text = "\n".join([*optima_lines(optima), *(f"warning: {w}" for w in optima.warnings), f"wrote {options.output}"])
    return Outcome(report, text)


def _study_file(options: Namespace) -> Path | None:
    """The study's file; ``None`` for the paper's curves."""
    if options.results is not None and options.curves is not None:
        raise UserError(f"found both {options.results} and --curves {options.curves}; expected one study")
    file: Path | None = options.results or options.curves
    return file


SCALING_VERBS = (fit, recommend, plan_sweep, plot)
