"""The 1% rule, its line and its intervals: the paper's optima exactly, and studies whose optima are known."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.config.errors import UserError
from navil_megatron.scaling.fit import estimate_noise
from navil_megatron.scaling.line import Line, grid_factor
from navil_megatron.scaling.load import load_study
from navil_megatron.scaling.recommend import Optima, find_optima, recommend
from navil_megatron.scaling.rule import find_optimum
from navil_megatron.scaling.shape import choose_shape
from navil_megatron.scaling.sizes import format_size, model_size, parse_size
from navil_megatron.scaling.study import Cell, Curve, Run, Study
from tests.unit.scaling_examples import additive, make_study, saturating, write_lines


@pytest.fixture(scope="module")
def paper() -> Optima:
    return find_optima(load_study(None))


def curve_of(**losses: float) -> Curve:
    """A curve of ``m100=1.2`` arguments: millions and losses."""
    sizes = [float(name[1:]) * 1e6 for name in losses]
    runs = [Run(llm=1e9, encoder=v, data=1e6, loss=x, where="") for v, x in zip(sizes, losses.values(), strict=True)]
    return Curve(1e9, 1e6, tuple(sizes), tuple(Cell((run,), run.loss) for run in runs))


@pytest.mark.parametrize(
    ("llm", "encoder", "depth", "width", "heads"),
    [("0.5B", 0.3e9, 18, 1152, 18), ("1.8B", 0.6e9, 24, 1472, 23), ("7B", 1.2e9, 32, 1792, 28)],
)
def test_paper_optima(paper: Optima, llm: str, encoder: float, depth: int, width: int, heads: int) -> None:
    advice = recommend(paper, model_size(llm))
    assert (advice.encoder, advice.relation, advice.method) == (encoder, "equal", "rule")
    assert (advice.shape.depth, advice.shape.width, advice.shape.heads) == (depth, width, heads)
    assert advice.interval == pytest.approx((encoder / math.sqrt(2), encoder * math.sqrt(2)))
    assert not advice.is_extrapolated


def test_paper_line(paper: Optima) -> None:
    line = paper.line
    assert line is not None
    assert (round(line.prefactor, 4), round(line.exponent, 4)) == (0.4347, 0.5251)
    assert [round(end, 2) for end in line.exponent_interval()] == [0.26, 0.79]


@pytest.mark.parametrize(
    ("llm", "encoder"), [("2B", 0.63), ("4B", 0.90), ("8B", 1.30), ("14B", 1.74), ("32B", 2.68), ("70B", 4.05)]
)
def test_other_llms_are_on_the_line(paper: Optima, llm: str, encoder: float) -> None:
    advice = recommend(paper, model_size(llm))
    assert round(advice.encoder / 1e9, 2) == encoder
    assert advice.method == "line"
    low, high = advice.interval
    assert low is not None and high is not None and low < advice.encoder < high
    assert advice.is_extrapolated == (model_size(llm) > 7e9)
    assert any("extrapolated" in warning for warning in advice.warnings) == advice.is_extrapolated
    assert any("from 3 points" in warning for warning in advice.warnings)


def test_interval_grows_away_from_the_measured_llms(paper: Optima) -> None:
    widths = []
    for size in (7.1e9, 14e9, 70e9):
        low, high = recommend(paper, size).interval
        assert low is not None and high is not None
        widths.append(high / low)
    assert widths == sorted(widths)


def test_paper_contradicts_itself_at_7b() -> None:
    (found,) = load_study(None).inconsistencies
    assert (found["llm_parameters"], found["figure_5_loss"], found["figure_6_loss"]) == (7e9, 0.667, 0.678)
    assert found["figure_6_encoder_with_this_loss"] == 1.2e9


def test_rule_counts_from_the_smallest_encoder_of_the_curve() -> None:
    # 1% of 2.0 is 0.02: the fall of 0.015 is less, although it is more than 1% of what is left.
    found = find_optimum(curve_of(m100=2.0, m200=1.015, m400=1.0))
    assert (found.encoder, found.relation) == (200e6, "equal")


def test_a_gain_of_exactly_the_threshold_is_not_less() -> None:
    found = find_optimum(curve_of(m100=1.0, m200=0.9, m400=0.89, m800=0.885))
    assert found.encoder == 400e6


def test_optima_at_the_ends() -> None:
    small = find_optimum(curve_of(m100=1.0, m200=0.999, m400=0.998))
    assert (small.encoder, small.relation, small.cell[0]) == (100e6, "at most", None)
    large = find_optimum(curve_of(m100=1.0, m200=0.9, m400=0.8))
    assert (large.encoder, large.relation, large.cell[1]) == (400e6, "at least", None)


def test_a_size_whose_double_was_not_trained_is_not_passed_by() -> None:
    found = find_optimum(curve_of(m100=1.0, m200=0.9, m300=0.89))
    assert (found.encoder, found.relation) == (200e6, "at least")
    (one, other) = (Run(llm=1e9, encoder=v, data=1e6, loss=1.0, where="") for v in (1e8, 1.5e8))
    assert Study(name="s", runs=(one, other)).curves() == []


def test_a_rise_counts_as_no_gain_and_a_later_fall_is_told() -> None:
    found = find_optimum(curve_of(m100=1.0, m200=0.9, m400=0.95, m800=0.8))
    assert found.encoder == 200e6
    assert "a later doubling gains 15.0%" in found.notes[0]


def test_missing_doublings_are_interpolated_and_told() -> None:
    found = find_optimum(curve_of(m100=1.0, m300=0.9, m900=0.895))
    assert found.encoder == 300e6
    assert "interpolated" in found.notes[0]


def test_shapes_of_nearly_one_size_are_one_size() -> None:
    sizes = {597e6: 0.80, 604e6: 0.79, 624e6: 0.81, 1.2e9: 0.785}
    runs = tuple(Run(llm=1e9, encoder=v, data=1e6, loss=x, where="") for v, x in sizes.items())
    (curve,) = Study(name="s", runs=runs).curves()
    assert curve.encoders == (604e6, 1.2e9)
    assert any("best counts" in warning for warning in find_optima(Study(name="s", runs=runs)).warnings)


def test_seeds_are_averaged_and_their_spread_widens_the_interval() -> None:
    exact = find_optima(make_study(saturating(), seeds=3))
    noisy = find_optima(make_study(saturating(), seeds=3, noise=0.01, draw=3))
    assert [len(cell.runs) for cell in noisy.found[0].curve.cells] == [3] * 6
    assert noisy.study.noise() == pytest.approx(0.01, rel=0.3)
    for size in (0.5e9, 1.8e9):
        (low, high), (noisy_low, noisy_high) = (recommend(each, size).interval for each in (exact, noisy))
        assert low is not None and high is not None
        assert noisy_low is None or noisy_low <= low
        assert noisy_high is None or noisy_high >= high


@pytest.mark.parametrize(("noise", "least"), [(0.0, 0.0), (0.005, 0.0025)])
def test_noise_of_single_runs_is_guessed(noise: float, least: float) -> None:
    """A smooth curve has none; a rough one has about what was put in."""
    optima = find_optima(make_study(additive(), noise=noise, draw=4))
    assert optima.noise == "curves"
    guessed = estimate_noise(found.curve for found in optima.found)
    assert guessed is not None and least <= guessed <= 2 * noise + 1e-5
    assert any("guessed" in warning for warning in optima.warnings)


@pytest.mark.parametrize("seeds", [1, 3])
def test_interval_of_a_measured_llm_covers_under_noise(seeds: int) -> None:
    """The exact curve's optimum lies in the interval of 95% of noisy curves, less what chance takes of 40."""
    exact = find_optima(make_study(additive(), (1.8e9,))).found[0].encoder
    held = 0
    for draw in range(40):
        low, high = recommend(
            find_optima(make_study(additive(), (1.8e9,), noise=0.003, seeds=seeds, draw=draw)), 1.8e9
        ).interval
        held += (low or 0) <= exact <= (high or math.inf)
    assert held >= 36


@settings(max_examples=40, deadline=None)
@given(
    exponent=st.floats(0.1, 0.9),
    prefactor=st.floats(0.2, 0.5),
    shift=st.floats(0, 1),
    llms=st.sampled_from([(0.5e9, 1.8e9, 7e9), (1e9, 4e9), (0.3e9, 0.6e9, 1.2e9, 2.4e9, 4.8e9)]),
)
def test_interval_of_the_exponent_holds_the_true_one(
    exponent: float, prefactor: float, shift: float, llms: tuple[float, ...]
) -> None:
    """Without noise (seeds agree) the grid is the only error, and the interval its worst case: it must always hold."""
    encoders = [2e6 * 2 ** (i + shift) for i in range(14)]
    optima = find_optima(make_study(saturating(exponent, prefactor), llms, encoders, seeds=2))
    assert optima.line is not None
    low, high = optima.line.exponent_interval()
    assert low - 1e-9 <= exponent <= high + 1e-9


def test_interval_of_the_exponent_covers_under_noise() -> None:
    """At least the stated 95% of 40 noisy studies, less what a binomial of 40 leaves to chance."""
    held = 0
    for draw in range(40):
        study = make_study(
            saturating(0.5, 0.4), encoders=[75e6 * 2**i for i in range(7)], noise=0.003, seeds=3, draw=draw
        )
        line = find_optima(study).line
        assert line is not None
        low, high = line.exponent_interval()
        held += low <= 0.5 <= high
    assert held >= 36


@given(st.floats(1e6, 1e11), st.floats(1.5, 30))
def test_grid_factor_is_the_lines_own_interval(llm: float, ratio: float) -> None:
    llms, half = (1e9, ratio * 1e9), math.log(2) / 2
    line = Line(llms, (3e8, 6e8), ((half, half), (half, half)))
    low, high = line.interval(llm)
    assert math.log(high / line.predict(llm)) == pytest.approx(grid_factor(llms, (half, half), llm))
    assert math.log(line.predict(llm) / low) == pytest.approx(grid_factor(llms, (half, half), llm))


def test_order_of_lines_changes_nothing(tmp_path: Path) -> None:
    study = make_study(saturating(), noise=0.002, seeds=2)
    forth, back = (
        recommend(find_optima(load_study(write_lines(study, tmp_path / f"{order}.jsonl", order))), 4e9)
        for order in (1, -1)
    )
    assert forth.encoder == pytest.approx(back.encoder)
    assert forth.interval == pytest.approx(back.interval)


def test_optima_at_the_ends_are_left_out_of_the_line() -> None:
    optima = find_optima(make_study(saturating(0.5, 0.4), (0.5e9, 1.8e9, 7e9, 100e9)))
    assert optima.line is not None and len(optima.line.llms) == 3
    assert recommend(optima, 100e9).relation == "at least"
    assert any("left out of the line" in warning for warning in recommend(optima, 4e9).warnings)


def test_no_line_of_one_optimum() -> None:
    optima = find_optima(make_study(saturating(), (1.8e9,)))
    with pytest.raises(UserError, match="needs 2 LLMs .* found 1"):
        recommend(optima, 4e9)


def test_llms_are_compared_at_the_most_data_of_all() -> None:
    study = make_study(saturating(), data=(30e6, 60e6))
    cut = replace(study, runs=tuple(run for run in study.runs if (run.llm, run.data) != (7e9, 60e6)))
    optima = find_optima(cut)
    assert optima.data == (30e6,)
    assert any("most that every LLM was given" in warning for warning in optima.warnings)
    assert find_optima(cut, llm=1.8e9).data == (60e6,)
    assert find_optima(cut, llm=7e9).data == find_optima(cut, llm=4e9).data == (30e6,)
    with pytest.raises(UserError, match="curves are there at 30M, 60M"):
        find_optima(cut, data=5e6)


@given(st.floats(2e6, 2e10))
def test_shapes_are_near_their_size_and_heads_divide_the_width(parameters: float) -> None:
    shape, warnings = choose_shape(parameters)
    assert shape.width == 64 * shape.heads
    assert shape.depth >= 1
    near = abs(math.log(shape.parameters / parameters)) <= math.log(1.1)
    assert near or warnings


def test_larger_encoders_are_no_shallower_and_no_narrower_than_a_step() -> None:
    shapes = [choose_shape(75e6 * 1.3**i)[0] for i in range(18)]
    assert all(a.depth <= b.depth for a, b in pairwise(shapes))
    assert all(a.width <= b.width for a, b in pairwise(shapes))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.5B", 0.5e9),
        ("500M", 0.5e9),
        ("1.8e9", 1.8e9),
        ("1.8b", 1.8e9),
        ("7T", 7e12),
        (" 75K ", 75e3),
        (".3B", 0.3e9),
    ],
)
def test_sizes(text: str, number: float) -> None:
    assert parse_size(text) == number
    assert parse_size(format_size(number)) == pytest.approx(number, rel=0.005)


@pytest.mark.parametrize(
    "text", ["", "B", "-1B", "0", "nan", "inf", "1e999", "1.8 billion", "1,8B", None, True, [], "8"]
)
def test_what_is_no_model_size(text: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        model_size(text)
