"""What the scaling verbs report: as JSON objects, and as text for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from navil_megatron.scaling.fit import DRAWS, UNITS, Fit, Points
from navil_megatron.scaling.laws import LARGEST_EXPONENT
from navil_megatron.scaling.paper import describe_inconsistency
from navil_megatron.scaling.recommend import Optima, Recommendation
from navil_megatron.scaling.rule import Interval
from navil_megatron.scaling.shape import HEAD_SIZE, SOURCE
from navil_megatron.scaling.sizes import format_size
from navil_megatron.scaling.study import CONFIDENCE, Study
from navil_megatron.scaling.sweep import Plan, Sweep, Wanted

Report = dict[str, Any]


def recommendation_json(optima: Optima, advice: Recommendation) -> Report:
    """Everything about a recommendation."""
    return {
        "study": optima.study.name,
        "llm_parameters": round(advice.llm),
        "encoder_parameters": round(advice.encoder),
        "relation": advice.relation,
        "method": advice.method,
        "interval": _whole(advice.interval),
        "depth": advice.shape.depth,
        "width": advice.shape.width,
        "heads": advice.shape.heads,
        "head_size": HEAD_SIZE,
        "shape_parameters": advice.shape.parameters,
        "shape_rule": SOURCE,
        "is_extrapolated": advice.is_extrapolated,
        "threshold": optima.threshold,
        "data": list(optima.data),
        "data_unit": optima.study.data_unit,
        "noise": optima.noise,
        **optima_json(optima),
        "warnings": list(advice.warnings),
    }


def optima_json(optima: Optima) -> Report:
    """Every LLM's optimum with its curve, and the line."""
    found = [
        {
            "llm_parameters": round(optimum.llm),
            "encoder_parameters": round(optimum.encoder),
            "relation": optimum.relation,
            "interval": _whole(optimum.interval),
            "agreement": optimum.agreement,
            "data": optimum.curve.data,
            "encoders": [round(encoder) for encoder in optimum.curve.encoders],
            "losses": list(optimum.curve.losses),
            "seeds": [len(cell.runs) for cell in optimum.curve.cells],
            "spreads": [cell.spread for cell in optimum.curve.cells],
            "gains": list(optimum.gains),
        }
        for optimum in optima.found
    ]
    line = optima.line and {
        "formula": "encoder_B = prefactor * llm_B ** exponent",
        "prefactor": optima.line.prefactor,
        "exponent": optima.line.exponent,
        "exponent_interval": list(optima.line.exponent_interval()),
        "points": len(optima.line.llms),
    }
    return {"optima": found, "line": line}


def _whole(interval: Interval) -> list[int | None]:
    return [None if end is None else round(end) for end in interval]


def recommendation_text(optima: Optima, advice: Recommendation) -> str:
    """The recommendation for a terminal."""
    sign = "" if advice.relation == "equal" else f"{advice.relation} "
    shape = advice.shape
    method = {"rule": "1% rule on this LLM's curve", "line": "log-log line through the measured LLMs"}[advice.method]
    lines = [
        f"study: {optima.study.name}",
        f"LLM {format_size(advice.llm)}: encoder of {sign}{format_size(advice.encoder)} "
        f"({_range(advice.interval)}), by the {method}",
        f"shape: depth {shape.depth}, width {shape.width}, {shape.heads} heads of {HEAD_SIZE}: "
        f"{shape.parameters:,} parameters",
        f"  {SOURCE}",
        "",
        *optima_lines(optima),
    ]
    return "\n".join([*lines, *_warning_lines(advice.warnings)])


def optima_lines(optima: Optima) -> list[str]:
    """A table of the optima, and the line."""
    rows = [("LLM", "data", "optimum", "interval", "gains from doubling, in % of the smallest encoder's loss")]
    for found in optima.found:
        gains = ", ".join(
            f"{format_size(encoder)} {'-' if gain is None else f'{gain:.2%}'}"
            for encoder, gain in zip(found.curve.encoders, found.gains, strict=True)
        )
        sign = {"equal": "", "at least": ">= ", "at most": "<= "}[found.relation]
        sizes = (format_size(found.llm), format_size(found.curve.data), sign + format_size(found.encoder))
        rows.append((*sizes, _range(found.interval), gains))
    lines = _table(rows)
    if optima.line is not None:
        low, high = optima.line.exponent_interval()
        lines += [
            "",
            f"line: encoder = {optima.line.prefactor:.3g} * LLM^{optima.line.exponent:.3f} (billions), exponent from "
            f"{low:.2f} to {high:.2f}, {len(optima.line.llms)} points",
        ]
    return lines


def _range(interval: Interval) -> str:
    low, high = interval
    if low is None:
        return "no bound" if high is None else f"up to {format_size(high)}"
    return f"from {format_size(low)}" if high is None else f"{format_size(low)} to {format_size(high)}"


def fit_json(study: Study, points: Points, fits: Mapping[str, Fit], refused: Mapping[str, str], held: Report) -> Report:
    """Every law with its parameters."""
    warnings = [*study.warnings, *(describe_inconsistency(found) for found in study.inconsistencies)]
    for law, fit in fits.items():
        for name, (low, high) in fit.intervals.items():
            if name.startswith("exponent") and high >= LARGEST_EXPONENT * 0.99:
                warnings.append(f"{law}: {name} is not determined by these points ({low:.2g} to {high:.2g})")
        for point in fit.outliers:
            warnings.append(f"{law}: outlier {point.where}: loss {point.loss:.4g}, expected {point.expected:.4g}")
    return {
        "study": study.name,
        "points": len(points.cells),
        "runs": sum(len(cell.runs) for cell in points.cells),
        "axes": list(points.axes),
        "units": {axis: UNITS[axis] for axis in points.axes},
        "data_unit": study.data_unit,
        "seed_noise": study.noise(),
        "confidence": CONFIDENCE,
        "fits": {law: asdict(fit) for law, fit in fits.items()},
        "refused": dict(refused),
        "held": held,
        "inconsistencies": list(study.inconsistencies),
        "warnings": warnings,
    }


def fit_text(report: Report) -> str:
    """The fits for a terminal."""
    units = {"llm": "N LLM parameters in billions", "encoder": "V encoder parameters in billions"}
    units["data"] = f"D {report['data_unit']} in millions"
    lines = [
        f"study: {report['study']}, {report['points']} points of {report['runs']} runs; "
        + ", ".join(units[axis] for axis in report["axes"]),
        f"in brackets: {report['confidence']:.0%} intervals of {DRAWS} bootstrap draws",
    ]
    for law, fit in report["fits"].items():
        left_out = fit["leave_one_out_rmse"]
        lines += ["", f"{law}: {fit['formula']}"]
        lines += _table(
            [
                (f"  {name}", f"{value:.4g}", "[{:.4g}, {:.4g}]".format(*fit["intervals"][name]))
                for name, value in fit["parameters"].items()
            ]
        )
        r2 = "-" if fit["r2_log"] is None else f"{fit['r2_log']:.4f}"
        lines.append(
            f"  R2 in log loss {r2}, RMSE {fit['rmse']:.4f}, leave-one-out RMSE "
            f"{'-' if left_out is None else f'{left_out:.4f}'}"
        )
    lines += [f"\nrefused: {reason}" for reason in report["refused"].values()]
    return "\n".join([*lines, *_warning_lines(report["warnings"])])


def sweep_json(name: str, sweep: Sweep, wanted: Wanted) -> Report:
    """The runs to buy, as lines of a study whose loss is missing, and what was assumed."""
    return {
        "study": name,
        "target_llm_parameters": round(wanted.target),
        "budget_gpu_hours": wanted.budget,
        "total_gpu_hours": sweep.plan.gpu_hours,
        "samples": sweep.plan.samples,
        "also_evaluated_at": list(sweep.also_at),
        "factor_before": sweep.factor_before,
        "factor_after": sweep.plan.factor,
        "cheaper": [_plan_json(plan) for plan in sweep.cheaper],
        "on_other_data": [_plan_json(plan) for plan in sweep.on_other_data],
        "assumptions": asdict(wanted.assumed),
        "runs": [{**asdict(run), "gpu_hours": round(run.gpu_hours, 2)} for run in sweep.plan.runs],
    }


def _plan_json(plan: Plan) -> Report:
    return {
        "samples": plan.samples,
        "gpu_hours": plan.gpu_hours,
        "factor": plan.factor,
        "num_runs": len(plan.runs),
        "llm_parameters": sorted({run.llm_parameters for run in plan.runs}),
    }


def sweep_text(report: Report) -> str:
    """The plan for a terminal."""
    assumed = report["assumptions"]
    rows: list[tuple[str, ...]] = [("LLM", "encoder", "samples", "seed", "GPU-hours")]
    for run in report["runs"]:
        sizes = (run["llm_parameters"], run["encoder_parameters"], run["samples"])
        rows.append((*(format_size(size) for size in sizes), str(run["seed"]), f"{run['gpu_hours']:,.1f}"))
    before = report["factor_before"]
    lines = [
        f"to know the encoder of a {format_size(report['target_llm_parameters'])} LLM, after: {report['study']}",
        f"assumed: {assumed['tflops']:g} TFLOP/s at {assumed['mfu']:.0%} MFU, {assumed['visual_tokens']} visual and "
        f"{assumed['text_tokens']} text tokens a sample",
        "criterion: the grid's part of the recommendation's interval, narrowest for the budget; noise is not in it",
        "",
        *_table(rows),
        "",
        f"total: {len(report['runs'])} runs, {report['total_gpu_hours']:,.1f} of {report['budget_gpu_hours']:,.0f} "
        "GPU-hours",
        f"the grid then leaves a factor of {report['factor_after']:.2f} up and down"
        + ("" if before is None else f", {before:.2f} before"),
    ]
    lines += [f"  cheaper: {_describe(plan)}" for plan in _thinned(report["cheaper"])]
    lines += [f"  at {format_size(plan['samples'])} samples: {_describe(plan)}" for plan in report["on_other_data"]]
    if report["also_evaluated_at"]:
        amounts = ", ".join(format_size(amount) for amount in report["also_evaluated_at"])
        lines.append(f"evaluate each run at {amounts} samples too: free under a constant learning rate")
    return "\n".join(lines)


def _describe(plan: Report) -> str:
    llms = ", ".join(format_size(size) for size in plan["llm_parameters"])
    hours = f"{plan['gpu_hours']:,.1f} GPU-hours"
    return f"a factor of {plan['factor']:.2f} for {hours}, {plan['num_runs']} runs with LLMs {llms}"


def _thinned(plans: Sequence[Report]) -> list[Report]:
    """Plans of which each is a tenth narrower than the one before."""
    kept: list[Report] = []
    for plan in plans:
        if not kept or plan["factor"] < 0.9 * kept[-1]["factor"]:
            kept.append(plan)
    return kept


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _warning_lines(warnings: Iterable[str]) -> list[str]:
    found = [f"warning: {warning}" for warning in warnings]
    return ["", *found] if found else []
