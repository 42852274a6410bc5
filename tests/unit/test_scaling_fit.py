"""Fits of studies whose law is known: parameters come back, intervals hold them as often as they say, bad runs show."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.config.errors import UserError
from navil_megatron.scaling.fit import choose_points, fit_law
from navil_megatron.scaling.study import Study
from tests.unit.scaling_examples import Loss, additive, make_study

ENCODERS, DATA = (75e6, 300e6, 1.2e9), (15e6, 30e6, 60e6, 120e6)


def power(n: float = 0.18, v: float = 0.03, d: float = 0.3) -> Loss:
    return lambda llm, encoder, data: 3 * (llm / 1e9) ** -n * (encoder / 1e9) ** -v * (data / 1e6) ** -d


def log_linear(llm: float, encoder: float, data: float) -> float:
    return 3 - 0.2 * math.log(llm / 1e9) - 0.03 * math.log(encoder / 1e9) - 0.3 * math.log(data / 1e6)


KNOWN = {
    "power": (power(), {"factor": 3.0, "exponent_N": 0.18, "exponent_V": 0.03, "exponent_D": 0.3}),
    "log-linear": (log_linear, {"constant": 3.0, "slope_N": -0.2, "slope_V": -0.03, "slope_D": -0.3}),
    "power-irreducible": (additive(), {"irreducible": 0.6, "factor_N": 0.3, "exponent_N": 0.3, "exponent_D": 0.5}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_exact_losses_give_the_law_back(name: str) -> None:
    loss, truth = KNOWN[name]
    fit = fit_law(name, choose_points(make_study(loss, encoders=ENCODERS, data=DATA), {}), draws=10)
    assert {key: fit.parameters[key] for key in truth} == pytest.approx(truth, rel=1e-3)
    assert fit.r2_log == pytest.approx(1, abs=1e-6)
    assert fit.rmse < 1e-4
    assert fit.outliers == ()


@settings(max_examples=20, deadline=None)
@given(n=st.floats(0.05, 0.6), v=st.floats(0.01, 0.3), d=st.floats(0.05, 0.6), draw=st.integers(0, 10**6))
def test_exponents_come_back_from_noise(n: float, v: float, d: float, draw: int) -> None:
    """Noise of 0.5% moves the exponents of 36 points over a range of 8 to 16 by less than five of its errors."""
    study = make_study(power(n, v, d), encoders=ENCODERS, data=DATA, noise=0.005, draw=draw)
    found = fit_law("power", choose_points(study, {}), draws=5).parameters
    for letter, exponent, values in (
        ("N", n, [run.llm for run in study.runs]),
        ("V", v, [run.encoder for run in study.runs]),
        ("D", d, [run.data for run in study.runs]),
    ):
        error = 0.005 / (np.log(values).std() * math.sqrt(len(values)))
        assert abs(found[f"exponent_{letter}"] - exponent) < 5 * error


@pytest.mark.parametrize("studies", [8, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KNOWN)
def test_intervals_cover_as_stated(name: str, studies: int) -> None:
    """The stated 95%, less three errors of a binomial of so many studies."""
    loss, truth = KNOWN[name]
    held = dict.fromkeys(truth, 0)
    for draw in range(studies):
        study = make_study(loss, encoders=ENCODERS, data=DATA, noise=0.005, draw=draw)
        fit = fit_law(name, choose_points(study, {}), draws=60)
        for key, value in truth.items():
            low, high = fit.intervals[key]
            held[key] += low <= value <= high
    assert min(held.values()) >= studies * (0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)), held


def test_three_points_cover_as_stated() -> None:
    """One degree of freedom: Student's t makes the intervals wide enough, and no point is called an outlier."""
    held = 0
    for draw in range(20):
        points = choose_points(make_study(power(), (0.5e9, 1.8e9, 7e9), (3e8,), noise=0.005, draw=draw), {})
        fit = fit_law("power", points, draws=60)
        low, high = fit.intervals["exponent_N"]
        held += low <= 0.18 <= high
        assert fit.outliers == ()
    assert held >= 17


def test_one_bad_run_is_named_and_bends_little() -> None:
    study = make_study(power(), encoders=ENCODERS, data=DATA, noise=0.002, draw=1)
    bad = replace(study.runs[17], loss=1.5 * study.runs[17].loss)
    study = replace(study, runs=(*study.runs[:17], bad, *study.runs[18:]))
    fit = fit_law("power", choose_points(study, {}), draws=20)
    (outlier,) = fit.outliers
    assert outlier.where == "study:18"
    assert outlier.expected == pytest.approx(bad.loss / 1.5, rel=0.01)
    assert fit.parameters["exponent_D"] == pytest.approx(0.3, abs=0.005)


def test_seeds_are_one_point() -> None:
    points = choose_points(make_study(power(), noise=0.01, seeds=3), {})
    assert len(points.cells) == 18
    assert points.losses[0] == pytest.approx(np.mean([run.loss for run in points.cells[0].runs]))


def test_leave_one_out_is_worse_than_the_fit_and_close_to_the_noise() -> None:
    study = make_study(power(), encoders=ENCODERS, data=DATA, noise=0.01)
    fit = fit_law("power", choose_points(study, {}), draws=5)
    assert fit.leave_one_out_rmse is not None
    assert fit.rmse < fit.leave_one_out_rmse < 0.02


@pytest.mark.parametrize(
    ("study", "name", "message"),
    [
        (make_study(power(), (1e9, 2e9), (3e8,)), "power", "needs at least 3 points, found 2"),
        (make_study(additive(), (1e9, 2e9), (1e8, 3e8, 9e8), DATA), "power-irreducible", "3 values of llm, found 2"),
    ],
)
def test_too_few_points_are_refused(study: Study, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_law(name, choose_points(study, {}))


def test_axes_that_vary_together_are_refused() -> None:
    runs = make_study(power(), (1e9, 2e9, 4e9, 8e9), (1e8, 2e8, 4e8, 8e8)).runs
    tied = Study(name="tied", runs=tuple(run for run in runs if run.encoder == run.llm / 10))
    with pytest.raises(UserError, match="vary only together"):
        fit_law("power", choose_points(tied, {}))


def test_held_axes_are_no_axes() -> None:
    points = choose_points(make_study(power(), data=DATA), {"llm": 1.8e9, "data": 60e6})
    assert points.axes == ("encoder",)
    assert {cell.runs[0].llm for cell in points.cells} == {1.8e9}
    with pytest.raises(UserError, match="has no run at"):
        choose_points(make_study(power()), {"llm": 3e9})
