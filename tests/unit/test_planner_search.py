"""The planned layouts: what fits is ranked, what does not says why, and the command tells both ways."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from navil_megatron.blueprint.workload import typical_sample, typical_workload
from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.config.load import load_config
from navil_megatron.config.validate import validate
from navil_megatron.data.types import ALONE
from navil_megatron.data.typical import typical_microbatch
from navil_megatron.planner.hardware import Hardware, ring_share
from navil_megatron.planner.search import Candidate, search_layouts
from tests.ranks import tiny_config
from tests.real_sizes import NAVIL_9B
from tests.unit.config_examples import EXAMPLE_TOML


@pytest.fixture(scope="module")
def found_9b() -> list[Candidate]:
    config = tiny_config(
        model=NAVIL_9B,
        data={"seq_length": 16_384},
        training={"global_batch_size": 64},
        precision={"type": "bf16"},
        runtime={"device": "cuda"},
    )
    return search_layouts(config, Hardware(gpus=16), typical_workload(config, 256, 1024))


def test_long_rows_are_split_and_short_ones_not(found_9b: list[Candidate]) -> None:
    assert {candidate.config.parallel.context_parallel_size for candidate in found_9b} == {1}
    config = tiny_config(
        model=replace(NAVIL_9B, language=replace(NAVIL_9B.language, max_position_embeddings=65_536)),
        data={"seq_length": 65_536},
        training={"global_batch_size": 8},
        precision={"type": "bf16"},
        runtime={"device": "cuda"},
    )
    found = search_layouts(config, Hardware(gpus=8), typical_workload(config, 256, 1024))
    plain = {
        candidate.config.parallel.context_parallel_size: candidate.estimate
        for candidate in found
        if candidate.estimate
        and candidate.config.parallel.model_parallel_size == candidate.config.parallel.context_parallel_size
        and candidate.config.parallel.expert_model_parallel_size == 1
        and candidate.config.training.recompute == "none"
    }
    assert set(plain) == {1, 2, 4, 8}
    for fewer, more in pairwise(sorted(plain)):
        kept, halved = plain[fewer].fullest.activations, plain[more].fullest.activations
        assert halved == pytest.approx(kept / 2, rel=0.01)
        assert plain[more].model_flops == pytest.approx(plain[fewer].model_flops)


def test_layouts_that_fit_come_first_and_fastest(found_9b: list[Candidate]) -> None:
    fits = [candidate.fits for candidate in found_9b]
    assert any(fits) and not all(fits)
    assert fits == sorted(fits, reverse=True)
    seconds = [candidate.estimate.step_seconds for candidate in found_9b if candidate.fits and candidate.estimate]
    assert seconds == sorted(seconds)


def test_every_verdict_has_a_reason(found_9b: list[Candidate]) -> None:
    assert all(candidate.reason for candidate in found_9b)
    large = [candidate for candidate in found_9b if candidate.estimate and not candidate.fits]
    assert all("usable GB" in candidate.reason for candidate in large)
    refused = [candidate for candidate in found_9b if candidate.estimate is None]
    assert any("needs parallel.sequence_parallel" in candidate.reason for candidate in refused)


def test_planned_layouts_are_valid_and_balance_the_first_stage(found_9b: list[Candidate]) -> None:
    piped = [c for c in found_9b if c.estimate and c.config.parallel.pipeline_model_parallel_size == 4]
    assert piped
    for candidate in piped:
        validate(candidate.config, 16)
        layers = candidate.config.parallel.pipeline_layers
        assert layers is not None and layers[0] < layers[1]


def test_recompute_takes_less_memory_and_more_time(found_9b: list[Candidate]) -> None:
    """Of equal layouts; under a pipeline the layers may lie otherwise."""
    by_recompute = {
        candidate.config.training.recompute: candidate.estimate
        for candidate in found_9b
        if candidate.estimate
        and candidate.config.parallel.tensor_model_parallel_size == 8
        and candidate.config.parallel.sequence_parallel
        and candidate.config.parallel.pipeline_model_parallel_size == 1
        and candidate.config.parallel.expert_model_parallel_size == 1
    }
    none, full = by_recompute["none"], by_recompute["full"]
    assert full.fullest.peak < none.fullest.peak
    assert full.step_seconds > none.step_seconds
    assert full.model_flops == none.model_flops


def test_several_experts_per_modality_are_planned() -> None:
    several = replace(NAVIL_9B.language, num_experts=4, experts_per_token=2)
    config = tiny_config(
        model=replace(NAVIL_9B, language=several),
        data={"seq_length": 8_192},
        training={"global_batch_size": 64},
        precision={"type": "bf16"},
        runtime={"device": "cuda"},
    )
    found = search_layouts(config, Hardware(gpus=64), typical_workload(config, 256, 1024))
    estimates = [candidate.estimate for candidate in found if candidate.estimate]
    assert {e.config.parallel.expert_model_parallel_size for e in estimates} == {1, 2, 4, 8}
    assert {e.config.parallel.expert_tensor_parallel_size for e in estimates} == {None, 1}
    by_ranks = {
        e.config.parallel.expert_model_parallel_size: e
        for e in estimates
        if e.config.parallel.model_parallel_size == 1 and e.config.training.recompute == "none"
    }
    assert by_ranks[4].fullest.weights < by_ranks[2].fullest.weights < by_ranks[1].fullest.weights
    # Eight ranks hold one expert each: those of the rarer modality wait.
    assert by_ranks[8].schedule.seconds > by_ranks[4].schedule.seconds


def test_ring_cost() -> None:
    assert ring_share("all-reduce", 4) == 1.5
    assert ring_share("all-gather", 4) == ring_share("reduce-scatter", 4) == 0.75
    assert ring_share("send", 4) == 1.0


def test_links_inside_a_node_are_faster() -> None:
    hardware = Hardware(gpus=64)
    assert hardware.link(8, 1) == 450e9
    assert hardware.link(8, 8) == 50e9


def test_typical_rows_are_full() -> None:
    config = replace(tiny_config(data={"seq_length": 16_384}), model=NAVIL_9B)
    work = typical_workload(config, 256, 1024)
    assert work.num_tokens == sum(work.segment_lengths) == 16_384
    assert work.visual_tokens == work.num_patches // 4 + work.num_predictions // 256


@pytest.mark.parametrize("seq_length", [384, 512, 1024, 2048, 8192])
def test_a_typical_sample_fits_a_short_row(seq_length: int) -> None:
    config = replace(tiny_config(data={"seq_length": seq_length}), model=NAVIL_9B)
    work = typical_workload(config, 256, 1024)
    assert work.num_tokens == sum(work.segment_lengths) == seq_length
    assert 0 < work.visual_tokens < seq_length and work.text_tokens > 0 and work.num_predictions > 0
    scales, text = typical_sample(config, 256, 1024)
    # The loader gives a rank the same.
    microbatch = typical_microbatch(config, ALONE, 256, 1024)
    assert microbatch.num_visual_tokens == work.visual_tokens
    assert (microbatch.loss_weights > 0).sum() == work.num_predictions
    assert text == 256 or len(scales) == 1


def test_rows_without_room_for_any_image_are_refused() -> None:
    config = replace(tiny_config(data={"seq_length": 32}), model=NAVIL_9B)
    with pytest.raises(UserError, match="the smallest image takes more than the 32 tokens of a row"):
        typical_workload(config, 256, 1024)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(EXAMPLE_TOML)
    return path


def test_command_prints_json_and_draws(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "schedule.svg"
    assert main(["plan", str(example), "--gpus", "4", "--json", "--picture", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["parameters"]["total"] == report["parameters"]["trainable"] > 0
    assert report["assumptions"]
    best = report["layouts"][0]
    assert best["fits"] and best["reason"] and best["step_seconds"] > 0 and 0 <= best["bubble"] < 1
    assert best["memory"]["peak_bytes"] == pytest.approx(
        sum(value for name, value in best["memory"].items() if name.endswith("_bytes") and name != "peak_bytes"), abs=4
    )
    assert picture.read_text().startswith("<svg")


def test_command_says_what_does_not_fit(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(example), "--gpus", "1", "--hbm", "3.001"]) == 1
    text = capsys.readouterr().out
    assert "0 of 4 layouts fit 1 GPUs of 3.001 GB" in text and "usable GB" in text


def test_phase_decides_what_is_trained(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(example), "training.phase=s1.1", "--gpus", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["parameters"]["trainable"] == report["parameters"]["trainable_by_phase"]["s1.1"]
    assert report["parameters"]["trainable"] < report["parameters"]["total"]


def test_bad_settings_are_one_line(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(example), "--gpus", "1", "optimizer.min_lr=1.0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: optimizer.min_lr")
    assert load_config(example).optimizer.min_lr == 0
