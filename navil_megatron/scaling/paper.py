"""Curves read off figures: the runs of figure 6, and what the paper's figures say of one another.

The file that comes with this package holds NaViL's own (arXiv 2510.08565), measured on the pictures: the authors
printed no numbers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import ConfigError
from navil_megatron.scaling.sizes import data_size, format_size, model_size, parse_size
from navil_megatron.scaling.study import Run, Study

PAPER_FILE = Path(__file__).with_name("paper_curves.json")
FIGURE = "fig6_encoder_scaling"
LLM_FIGURE = "fig5_llm_scaling_600M_encoder_120M"
LLM_FIGURE_ENCODER, LLM_FIGURE_DATA = 600e6, 120e6  # of every point of figure 5, as its caption says


def read_curves(curves: Mapping[str, Any], file: str, name: str) -> Study:
    """The study of a curves file; ``file`` names it in messages, ``name`` in reports.

    ``curves`` are ``{"fig6_encoder_scaling": {LLM size: {"enc_M": [millions, ...], amount of data: [loss, ...]}}}``; a
    loss that could not be read is null. Other figures may be there or not.

    Raises:
        ConfigError: A curve is wrong; one problem each.
    """
    figure = curves.get(FIGURE)
    if not isinstance(figure, Mapping):
        raise ConfigError(f"{file}: {FIGURE} is missing; expected curves of LLM sizes there, or one run a line")
    problems: list[str] = []
    runs: list[Run] = []
    for title, curve in figure.items():
        if isinstance(curve, Mapping):
            runs += _read_llm(title, curve, f"{file}: {FIGURE}.{title}", problems)
    if not runs and not problems:
        problems.append(f"{file}: {FIGURE} holds no curve; expected one for each LLM size")
    if problems:
        raise ConfigError(problems)
    errors = curves.get("uncertainty")
    error = errors.get("fig6_rel") if isinstance(errors, Mapping) else None
    reading_error = float(error) if isinstance(error, int | float) and 0 < error < 1 else None
    contradictions = tuple(_contradictions(curves.get(LLM_FIGURE), runs, reading_error)) if reading_error else ()
    return Study(name=name, runs=tuple(runs), reading_error=reading_error, inconsistencies=contradictions)


def _read_llm(title: str, curve: Mapping[str, Any], where: str, problems: list[str]) -> Iterator[Run]:
    """The runs of one LLM; what is wrong is added to ``problems``."""
    try:
        llm = model_size(title)
        encoders = [model_size(parse_size(size) * 1e6) for size in curve["enc_M"]]
    except KeyError:
        problems.append(f"{where}.enc_M is missing; expected the encoder sizes in millions")
        return
    except (ValueError, TypeError) as error:
        problems.append(f"{where}: {error}")
        return
    for amount, losses in curve.items():
        if amount == "enc_M":
            continue
        place = f"{where}.{amount}"
        try:
            data = data_size(amount)
            if not isinstance(losses, list) or len(losses) != len(encoders):
                found = len(losses) if isinstance(losses, list) else repr(losses)
                raise ValueError(f"found {found} losses for {len(encoders)} encoder sizes; use null for a missing one")
            for encoder, loss in zip(encoders, losses, strict=True):
                if loss is not None:
                    at = f"{place}[{format_size(encoder)}]"
                    yield Run(llm=llm, encoder=encoder, data=data, loss=parse_size(loss), where=at)
        except ValueError as error:
            problems.append(f"{place}: {error}")


def _contradictions(figure: object, runs: list[Run], reading_error: float) -> Iterator[dict[str, Any]]:
    """Points of figure 5 that figure 6 contradicts: same LLM, encoder and data, losses further apart than both can
    have been misread. Each with both losses, and the encoder of figure 6 whose loss figure 5 shows instead.
    """
    if not isinstance(figure, Mapping):
        return
    for size, published in zip(figure.get("llm_B", ()), figure.get("loss", ()), strict=False):
        llm = size * 1e9
        at = [run for run in runs if abs(run.llm / llm - 1) < 1e-3 and run.data == LLM_FIGURE_DATA]
        expected = {run.encoder: run.loss for run in at}.get(LLM_FIGURE_ENCODER)
        if expected is None or published is None or abs(published - expected) <= 2 * reading_error * expected:
            continue
        nearest = min(at, key=lambda run: abs(run.loss - published))
        yield {
            "llm_parameters": llm,
            "figure_5_loss": published,
            "figure_6_loss": expected,
            "encoder_of_both": LLM_FIGURE_ENCODER,
            "figure_6_encoder_with_this_loss": nearest.encoder,
            "figure_6_loss_of_that_encoder": nearest.loss,
        }


def describe_inconsistency(found: Mapping[str, Any]) -> str:
    """One line of what ``Study.inconsistencies`` holds."""
    return (
        f"the paper contradicts itself: figure 5 shows loss {found['figure_5_loss']:.3f} for the "
        f"{format_size(found['llm_parameters'])} LLM with the {format_size(found['encoder_of_both'])} encoder, figure "
        f"6 {found['figure_6_loss']:.3f}; {found['figure_6_loss_of_that_encoder']:.3f} is figure 6's value for "
        f"{format_size(found['figure_6_encoder_with_this_loss'])}"
    )
