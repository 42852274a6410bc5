"""The ``navil-megatron scaling`` verbs: their options, and what they run.

Nothing heavy is imported until a verb runs, so that ``--help`` answers at once.
"""

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from navil_megatron.config.arguments import count, positive
from navil_megatron.config.errors import UserError
from navil_megatron.scaling.sizes import data_size, model_size

Outcome = tuple[dict[str, Any], str, int]
"""Report, its text for a terminal, and the exit status."""
AddVerb = Callable[..., argparse.ArgumentParser]


def add_scaling_verbs(add_verb: AddVerb) -> None:
    """Adds the verbs; ``add_verb(name, run, what, example)`` makes the parser of one."""
    _add_fit(add_verb)
    _add_recommend(add_verb)
    _add_plan_sweep(add_verb)
    _add_plot(add_verb)


def _add_fit(add_verb: AddVerb) -> None:
    parser = add_verb(
        "fit",
        run_fit,
        "fit the loss as a function of LLM size, encoder size and data, with intervals",
        "navil-megatron scaling fit results.jsonl --data 120M",
    )
    _add_study(parser)
    parser.add_argument(
        "--form", choices=("log-linear", "power", "power-irreducible"), help="one law (all that can be)"
    )
    for axis, what in (("llm", "LLM"), ("encoder", "encoder")):
        parser.add_argument(f"--{axis}", type=_model, metavar="SIZE", help=f"fit the runs of this {what} alone")
    parser.add_argument("--data", type=_data, metavar="N", help="fit the runs at this amount of data alone")
    parser.add_argument("--seed", type=_whole, default=0, metavar="N", help="of the bootstrap (0)")


def _add_recommend(add_verb: AddVerb) -> None:
    parser = add_verb(
        "recommend",
        run_recommend,
        "the visual encoder for an LLM, by the paper's 1%% rule: parameters, depth, width, heads, interval",
        "navil-megatron scaling recommend --llm 8B\n"
        "  navil-megatron scaling recommend --curves results.jsonl --llm 1.8B --json",
    )
    _add_study(parser)
    parser.add_argument("--llm", type=_model, required=True, metavar="SIZE", help="parameters: 8B, 500M, 1.8e9")
    _add_rule(parser)


def _add_plan_sweep(add_verb: AddVerb) -> None:
    parser = add_verb(
        "plan-sweep",
        run_plan_sweep,
        "which runs to buy for a budget of GPU-hours; with a study's results, in addition to them",
        "navil-megatron scaling plan-sweep --llm 8B --gpu-hours 20000 --output runs.jsonl",
    )
    _add_study(parser)
    parser.add_argument("--llm", type=_model, required=True, metavar="SIZE", help="LLM whose encoder is to be known")
    parser.add_argument("--gpu-hours", type=positive, required=True, metavar="HOURS", help="the budget")
    sizes, amounts = ["0.5B", "1B", "1.8B", "4B", "7B"], ["30M", "60M", "120M"]
    parser.add_argument("--llms", type=_model, nargs="+", metavar="SIZE", help=f"that can be trained ({_join(sizes)})")
    parser.add_argument("--samples", type=_data, nargs="+", metavar="N", help=f"amounts of data ({_join(amounts)})")
    parser.set_defaults(llms=[model_size(size) for size in sizes], samples=[data_size(amount) for amount in amounts])
    parser.add_argument("--seeds", type=count, default=1, metavar="N", help="runs of each size (1)")
    parser.add_argument("--tflops", type=positive, default=989.0, metavar="TFLOP/s", help="peak of a GPU (989)")
    parser.add_argument("--mfu", type=_share, default=0.4, metavar="SHARE", help="of the peak that is reached (0.4)")
    parser.add_argument("--visual-tokens", type=count, default=256, metavar="N", help="of a sample (256)")
    parser.add_argument("--text-tokens", type=count, default=64, metavar="N", help="of a sample (64)")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="write the runs, one a line")


def _add_plot(add_verb: AddVerb) -> None:
    parser = add_verb(
        "plot",
        run_plot,
        "draw the loss over encoder sizes with the optima, and their line with its interval",
        "navil-megatron scaling plot results.jsonl --output study.svg --llm 8B",
    )
    _add_study(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to write, .svg or .png")
    parser.add_argument("--llm", type=_model, metavar="SIZE", help="mark this LLM on the line")
    _add_rule(parser)


def _add_study(parser: argparse.ArgumentParser) -> None:
    what = "a study's JSON lines, or curves like the paper's (the paper's own)"
    parser.add_argument("results", type=Path, nargs="?", metavar="RESULTS", help=what)
    parser.add_argument("--curves", type=Path, metavar="FILE", help="the same, as an option")


def _add_rule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=_data, metavar="N", help="samples or tokens at which to compare (the most there is)"
    )
    parser.add_argument("--threshold", type=_share, default=0.01, metavar="SHARE", help="of the rule (0.01)")
    parser.add_argument("--seed", type=_whole, default=0, metavar="N", help="of the draws of noise (0)")


def _study_file(options: argparse.Namespace) -> Path | None:
    """The study's file; ``None`` for the paper's curves."""
    for name in ("scipy", "matplotlib"):
        if find_spec(name) is None:
            raise UserError(f"{name} is not installed; run: pip install 'navil_megatron[study]'")
    if options.results is not None and options.curves is not None:
        raise UserError(f"found both {options.results} and --curves {options.curves}; expected one study")
    file: Path | None = options.results or options.curves
    return file


def run_fit(options: argparse.Namespace) -> Outcome:
    """Fits every law that the points are enough for."""
    file = _study_file(options)

    from navil_megatron.scaling.fit import choose_points, fit_law, refusal
    from navil_megatron.scaling.laws import LAWS
    from navil_megatron.scaling.load import load_study
    from navil_megatron.scaling.paper import find_inconsistencies
    from navil_megatron.scaling.report import fit_json, fit_text

    study = load_study(file)
    held = {axis: value for axis in ("llm", "encoder", "data") if (value := getattr(options, axis)) is not None}
    points = choose_points(study, held)
    names = [options.form] if options.form else list(LAWS)
    refused = {name: reason for name in names if (reason := refusal(LAWS[name], points))}
    if len(refused) == len(names):
        raise UserError("; ".join(refused.values()))
    fits = [fit_law(name, points, options.seed) for name in names if name not in refused]
    report = fit_json(study, points, fits, refused, {"held": held, "inconsistencies": find_inconsistencies(study)})
    return report, fit_text(report), 0


def run_recommend(options: argparse.Namespace) -> Outcome:
    """The encoder for an LLM."""
    file = _study_file(options)

    from navil_megatron.scaling.load import load_study
    from navil_megatron.scaling.recommend import find_optima, find_optima_for, recommend
    from navil_megatron.scaling.report import recommendation_json, recommendation_text

    study = load_study(file)
    if options.data is None:
        optima = find_optima_for(study, options.llm, options.threshold, options.seed)
    else:
        optima = find_optima(study, options.threshold, options.data, options.seed)
    advice = recommend(optima, options.llm)
    return recommendation_json(optima, advice), recommendation_text(optima, advice), 0


def run_plan_sweep(options: argparse.Namespace) -> Outcome:
    """Chooses the runs, and writes them if asked."""
    file = _study_file(options)

    from navil_megatron.scaling.cost import Machine
    from navil_megatron.scaling.load import load_study
    from navil_megatron.scaling.recommend import find_optima
    from navil_megatron.scaling.report import sweep_json, sweep_text
    from navil_megatron.scaling.sweep import MOST_LLMS, Wanted, plan_sweep

    optima = find_optima(load_study(file))
    if optima.line is None:
        raise UserError(f"{file} has fewer than 2 optima inside their curves; plan from the paper's, without a study")
    llms = tuple(sorted(set(options.llms)))
    if not (2 if file is None else 1) <= len(llms) <= MOST_LLMS:
        raise UserError(f"found {len(llms)} sizes in --llms, expected 2 to {MOST_LLMS}: a line needs two")
    machine = Machine(
        tflops=options.tflops, mfu=options.mfu, visual_tokens=options.visual_tokens, text_tokens=options.text_tokens
    )
    wanted = Wanted(
        target=options.llm,
        budget=options.gpu_hours,
        llms=llms,
        samples=tuple(options.samples),
        seeds=options.seeds,
        machine=machine,
    )
    sweep = plan_sweep(optima.line, wanted, is_measured=file is not None)
    name = f"the results of {file}" if file else "nothing yet; optima expected where the paper has them"
    report = sweep_json(name, sweep, wanted)
    if options.output is not None:
        options.output.write_text("".join(json.dumps(run) + "\n" for run in report["runs"]), "utf-8")
    return report, sweep_text(report), 0


def run_plot(options: argparse.Namespace) -> Outcome:
    """Draws the study."""
    if options.output.suffix not in {".svg", ".png"}:
        raise UserError(
            f"--output {options.output}: found {options.output.suffix or 'no suffix'}, expected .svg or .png"
        )
    file = _study_file(options)

    from navil_megatron.scaling.load import load_study
    from navil_megatron.scaling.picture import draw_study
    from navil_megatron.scaling.recommend import find_optima
    from navil_megatron.scaling.report import line_json, optima_json, optima_lines

    optima = find_optima(load_study(file), options.threshold, options.data, options.seed)
    draw_study(optima, options.output, options.llm)
    report = {
        "study": optima.study.name,
        "output": str(options.output),
        "optima": optima_json(optima),
        "line": None if optima.line is None else line_json(optima.line),
        "warnings": list(optima.warnings),
    }
    text = "\n".join([*optima_lines(optima), *(f"warning: {w}" for w in optima.warnings), f"wrote {options.output}"])
    return report, text, 0


def _join(words: list[str]) -> str:
    return " ".join(words)


def _model(text: str) -> float:
    return _told(model_size, text)


def _data(text: str) -> float:
    return _told(data_size, text)


def _told(parse: Callable[[object], float], text: str) -> float:
    """A size, for argparse, which keeps the message of its own errors alone."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _whole(text: str) -> int:
    """A whole number from 0 up, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"found {number}, expected at least 0")
    return number


def _share(text: str) -> float:
    """A number above 0 and at most 1, for argparse."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected more than 0 and at most 1")
    return number
