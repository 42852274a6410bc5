"""The study: what its arms are, and what its tables and verdicts make of known losses."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from navil_megatron.config.load import load_config
from navil_megatron.config.validate import validate
from tests.conftest import REPOSITORY
from tools.study.arms import SCALES, Arm, studies
from tools.study.one_run import overrides
from tools.study.report import Runs, at_best_rate, chosen_rates, table, verdicts

DATA = {
    "special_token_ids": list(range(400, 412)),
    "vocab_size": 412,
    "tokenizer": "tokenizer",
    "train_index": "train.index",
    "heldout_index": "heldout.index",
}


@pytest.mark.parametrize("name", SCALES)
def test_every_arm_is_a_valid_run_of_its_own(name: str, tmp_path: Path) -> None:
    scale = SCALES[name]
    for study in studies(scale).values():
        assert replace(study.arms[study.preferred], max_image_pixels=None, length=1) == scale.base
        arms = set(study.arms.values())
        assert len({arm.name for arm in arms}) == len(arms) == len(study.arms)
        for arm in arms:
            words = overrides(arm, scale.llms[arm.llm], 1, DATA, tmp_path)
            validate(load_config(REPOSITORY / "tools" / "study" / scale.config, [*words, *scale.overrides]), 1)


@pytest.mark.parametrize("name", SCALES)
def test_sizes_are_what_the_studies_need(name: str) -> None:
    scale = SCALES[name]
    equal = [12 * depth * width**2 for depth, width in scale.shapes]
    assert max(equal) / min(equal) < 1.1
    sizes = [12 * depth * width**2 + 768 * width for depth, width in scale.encoders]
    assert all(1.8 < larger / smaller < 2.25 for smaller, larger in pairwise(sizes))


def runs(losses_by_seed: list[list[float]]) -> Runs:
    """Losses after 1,000, 2,000, 4,000 and 8,000 samples of each seed."""
    results = [
        {
            "seed": seed,
            "encoder_parameters": 26_000,
            "points": [{"samples": 1_000 * 2**step, "loss": loss} for step, loss in enumerate(losses)],
        }
        for seed, losses in enumerate(losses_by_seed)
    ]
    return Runs(Arm("base", 1, 16), results)


def test_verdicts_tell_a_difference_from_noise_and_measure_the_data_it_saves() -> None:
    arms = {
        "good": runs([[1.0, 0.8, 0.6, 0.4], [1.02, 0.82, 0.62, 0.42], [0.98, 0.78, 0.58, 0.38]]),
        "bad": runs([[1.01, 0.95, 0.9, 0.8], [1.03, 0.97, 0.92, 0.82], [0.99, 0.93, 0.88, 0.78]]),
    }
    (line,) = verdicts(arms, "good", [1_000, 8_000])
    assert line.startswith("at 1,000 samples good and bad cannot be told apart (1% apart, p = 0.57)")
    assert "at 8,000 samples good is 50% below bad" in line
    # The mean of "good" is 0.8 after 2,000 of 8,000 samples.
    assert line.endswith("good reaches the last loss of bad with 0.25 of the data.")
    assert table(arms, [1_000, 8_000])[2:] == [
        "| good | 26k | 3 | 1.000 ± 0.020 | 0.400 ± 0.020 |",
        "| bad | 26k | 3 | 1.010 ± 0.020 | 0.800 ± 0.020 |",
    ]


def test_losses_between_evaluations_lie_on_a_line_in_log_samples() -> None:
    assert runs([[1.0, 0.5, 0.5, 0.5]]).losses(2**0.5 * 1_000) == pytest.approx([0.75])


def test_the_published_lines_are_those_of_the_published_runs() -> None:
    page = (REPOSITORY / "docs" / "study.md").read_text()
    for letter in studies(SCALES["cpu"]):
        assert f"<!-- {letter}: written by tools/study/run.py -->" in page
        assert (REPOSITORY / "docs" / "study" / f"{letter}.svg").exists()
    lines = [json.loads(line) for line in (REPOSITORY / "docs" / "study" / "d.jsonl").read_text().splitlines()]
    assert {(line["seed"], line["llm_parameters"]) for line in lines} == {
        (seed, size) for seed in (1, 2, 3) for size in {line["llm_parameters"] for line in lines}
    }


def test_each_arm_is_shown_at_its_best_rate_among_those_with_all_seeds(tmp_path: Path) -> None:
    losses = {None: [0.5, 0.7], 1e-3: [0.4, 0.6], 5e-4: [0.1]}
    arm = Arm("base", 1, 16)
    for rate, of_seeds in losses.items():
        for seed, loss in enumerate(of_seeds, 1):
            place = tmp_path / "runs" / f"{replace(arm, rate=rate).name}_seed{seed}"
            place.mkdir(parents=True)
            (place / "result.json").write_text(json.dumps(runs([[1.0, 0.9, 0.8, loss]]).results[0]))
    best = at_best_rate(tmp_path, arm, 2, losses)
    assert best.arm.rate == 1e-3 and best.losses(8_000) == [0.4, 0.6]
    rates = {5e-4: 5e-4, 1e-3: 1e-3, 2e-3: None}
    usual = at_best_rate(tmp_path, arm, 2, [None])
    assert chosen_rates({"best": best, "usual": usual}, rates) == (
        "Learning rates, for each arm the best of 0.0005, 0.001, 0.002: best 0.001, usual 0.002."
    )
    assert at_best_rate(tmp_path, arm, 1, losses).arm.rate == 5e-4
