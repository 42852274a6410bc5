"""Whole training runs on real ranks: resume, records, phases, initial weights, damage, and equality with the export."""

import io
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.cli import main
from navil_megatron.config.data import SourceConfig
from navil_megatron.config.errors import EXIT_CODE
from navil_megatron.config.precision import PrecisionConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loader import plan_run
from navil_megatron.data.shards.source import Source
from navil_megatron.data.validation import ValidationLoader
from navil_megatron.models.build import build_model
from navil_megatron.training.batch import place_of
from navil_megatron.training.evaluate import evaluate
from navil_megatron.training.grad_norms import PARTS
from tests.e2e.runs import (
    World,
    error_lines,
    make_run,
    pretrain_in_rank,
    records,
    saved_steps,
    train_in_rank,
    write_toml,
)
from tests.ranks import run_ranks, start_session
from tests.tolerances import EXPORT, RANKS
from tests.unit.data_examples import damage_image, damage_text, write_samples
from tests.whole import assemble, slices_of
from tests.whole_checkpoint import read_whole_checkpoint

TENSOR = {"tp": 2, "sequence_parallel": True}
PIPELINE = {"pp": 2}
DATA: dict[str, Any] = {}
EXACT = {"rtol": 0.0, "atol": 0.0}
TRAINED_WHEN_FROZEN = ("vision_encoder.", "connector.", "special_token_embedding.")


def whole(config: NaViLConfig, step: int) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint."""
    return read_whole_checkpoint(Path(config.checkpoint.directory) / f"step_{step:08d}")[1]


@pytest.mark.parametrize(
    ("layout", "precision"),
    [(TENSOR, "fp32"), (TENSOR, "bf16"), (PIPELINE, "bf16"), (DATA, "bf16")],
    ids=["tensor-fp32", "tensor-bf16", "pipeline-bf16", "data-bf16"],
)
def test_resumed_run_equals_the_straight_one(
    world: World, tmp_path: Path, layout: dict[str, Any], precision: str
) -> None:
    sections = {
        "parallel": layout,
        "training": {"train_steps": 6},
        "precision": {"type": precision},
        "optimizer": {"lr_schedule": "cosine", "warmup_steps": 2, "lr": 1e-2, "min_lr": 1e-3},
    }
    straight = make_run(world, tmp_path / "straight", checkpoint={"save_every_steps": 3}, **sections)
    resumed = make_run(world, tmp_path / "resumed", **sections)
    states = run_ranks(2, train_in_rank, straight)
    # What a machine that dies after step 3 leaves behind.
    crashed = Path(straight.checkpoint.directory) / "step_00000003"
    shutil.copytree(crashed, Path(resumed.checkpoint.directory) / "step_00000003")
    assert run_ranks(2, train_in_rank, resumed) == states
    every, later = records(straight, "train"), records(resumed, "train")
    assert [record["step"] for record in every] == [1, 2, 3, 4, 5, 6]
    for name in ("step", "loss", "grad_norm", "lr", "samples", "tokens", "consumed_samples", "consumed_tokens"):
        assert [record[name] for record in later] == [record[name] for record in every[3:]], name
    torch.testing.assert_close(whole(resumed, 6), whole(straight, 6), **EXACT)
    moved = whole(straight, 3), whole(straight, 6)
    assert all(not torch.equal(moved[0][key], moved[1][key]) for key in moved[0])


def test_records_of_a_run(world: World, tmp_path: Path) -> None:
    config = make_run(
        world,
        tmp_path,
        parallel=TENSOR,
        training={"train_steps": 7},
        precision={"type": "bf16"},
        evaluation={"every_steps": 3, "swapped_images": True},
        optimizer={"lr": 1e-2, "min_lr": 1e-3, "lr_schedule": "cosine", "warmup_steps": 3},
        checkpoint={"save_every_steps": 2, "keep_last": 2},
        logging={"tensorboard": True, "feature_scale_every_steps": 4},
    )
    states = run_ranks(2, train_in_rank, config)
    found = records(config, "train")
    assert [record["lr"] for record in found] == pytest.approx(
        [1e-2 / 3, 2e-2 / 3, *(1e-3 + 9e-3 * (1 + math.cos(math.pi * part / 4)) / 2 for part in range(5))]
    )
    row_tokens = config.training.global_batch_size * config.data.seq_length
    documented = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    for record in found:
        assert [name for name in record if f"`{name.split('/')[0]}" not in documented] == []
        assert record["train_steps"] == 7
        assert 0 < record["loss"] < 20
        assert 0 < record["grad_norm"] < 1000
        assert record["tokens_per_second"] == pytest.approx(
            record["text_tokens_per_second"] + record["visual_tokens_per_second"]
        )
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_seconds"])
        assert record["visual_tokens_per_second"] > 0
        assert record["padding_share"] == pytest.approx(1 - record["tokens"] / row_tokens)
        assert 0 <= record["padding_share"] < 1
        assert 0 <= record["data_wait_seconds"] < record["step_seconds"]
        assert record["peak_memory_bytes"] > 50_000_000
        assert record["flops_per_second"] > 0
        assert record["failed_samples"] == record["skipped_steps"] == 0
        assert record["visual_share"] == pytest.approx(record["visual_tokens_per_second"] / record["tokens_per_second"])
        parts = [record[f"grad_norm/{part}"] for part in PARTS]
        assert min(parts) > 0 and math.hypot(*parts) == pytest.approx(record["grad_norm"])
        kinds = [record[name] for name in ("loss_text_only", "loss_with_images") if name in record]
        between = min(max(record["loss"], min(kinds)), max(kinds))
        assert record["loss"] == pytest.approx(between, rel=RANKS["rtol"])
    scales = records(config, "feature_scale")
    assert [record["step"] for record in scales] == [4, 7]
    layers = config.model.language.num_layers + 1
    assert all(len(record) == 3 + 2 * (layers + 1) and min(record["text/layer_0"], 1) > 0 for record in scales)
    assert found[-1]["loss"] < found[0]["loss"]
    assert states[0]["consumed_samples"] == found[-1]["consumed_samples"] == sum(r["samples"] for r in found)
    assert states[0]["consumed_tokens"] == found[-1]["consumed_tokens"] == sum(r["tokens"] for r in found)
    evaluations = records(config, "evaluation")
    assert [record["step"] for record in evaluations] == [3, 6, 7]
    assert all(0 < record["loss"] < 20 for record in evaluations)
    assert all(record["loss"] != record["loss_swapped_images"] for record in evaluations)
    assert saved_steps(config) == ["step_00000006", "step_00000007"]
    events = list((Path(config.logging.directory) / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1
    content = events[0].read_bytes()
    assert all(
        name in content for name in (b"train/loss", b"feature_scale/visual/layer_0", b"evaluation/loss_swapped_images")
    )


def test_steps_between_records_are_counted_in_the_checkpoint(world: World, tmp_path: Path) -> None:
    """A save that falls between two records must know what was consumed since the last one."""
    sections = {"training": {"train_steps": 4, "log_every_steps": 3}}
    straight = make_run(world, tmp_path / "straight", **sections)
    stopped = make_run(world, tmp_path / "stopped", checkpoint={"save_every_steps": 2}, **sections)
    resumed = make_run(world, tmp_path / "resumed", **sections)
    (expected,) = run_ranks(1, train_in_rank, straight)
    run_ranks(1, train_in_rank, stopped)
    crashed = Path(stopped.checkpoint.directory) / "step_00000002"
    shutil.copytree(crashed, Path(resumed.checkpoint.directory) / "step_00000002")
    (state,) = run_ranks(1, train_in_rank, resumed)
    assert state == expected
    assert records(resumed, "train")[-1]["consumed_samples"] == expected["consumed_samples"]


def recipe_in_rank(rank: int, world_size: int, configs: list[NaViLConfig]) -> list:
    """The phases one after the other, each from the weights of the one before; gives the first one's first weights."""
    with start_session(rank, world_size, configs[0]) as session:
        first = slices_of(build_model(configs[0], session.groups, session.device))
    for config in configs:
        train_in_rank(rank, world_size, config)
    return first


def is_trained(key: str, phase: str) -> bool:
    """Tables 7 and 8 of the paper, told by the keys of a checkpoint."""
    visual = key.startswith(TRAINED_WHEN_FROZEN) or key.endswith(".visual.weight")
    text_attention = ".self_attention." in key and key.endswith(".text.weight")
    return visual or (text_attention and phase == "s1.2") or phase == "s2"


@pytest.mark.parametrize(
    "layout", [TENSOR, PIPELINE | {"pipeline_layers": (2, 0)}], ids=["tensor", "stage_with_nothing_to_train"]
)
def test_each_phase_trains_exactly_its_parameters(world: World, tmp_path: Path, layout: dict[str, Any]) -> None:
    configs: list[NaViLConfig] = []
    for phase in ("s1.1", "s1.2", "s2"):
        weights = {"initial_weights": configs[-1].checkpoint.directory} if configs else {}
        folder = tmp_path / phase
        configs.append(
            make_run(
                world,
                folder,
                parallel=layout,
                training={"phase": phase, "train_steps": 2},
                precision={"type": "bf16"},
                optimizer={"warmup_steps": 0},
                checkpoint={"directory": str(folder / "checkpoints")} | weights,
            )
        )
    slices = run_ranks(2, recipe_in_rank, configs)
    before = assemble([piece for rank in slices for piece in rank])
    for config in configs:
        after, phase = whole(config, 2), config.training.phase
        assert after.keys() == before.keys()
        changed = {key for key in after if not torch.equal(after[key], before[key])}
        assert changed == {key for key in after if is_trained(key, phase)}, phase
        assert [record["step"] for record in records(config, "train")] == [1, 2]
        assert all(record["grad_norm"] > 0 for record in records(config, "train"))
        before = after


def test_initial_weights_bring_nothing_but_weights(world: World, tmp_path: Path) -> None:
    """A run from another's weights steps, counts and reads data from the start, with fresh moments."""
    first = make_run(world, tmp_path / "first", parallel=TENSOR, training={"train_steps": 3})
    run_ranks(2, train_in_rank, first)
    given = {"initial_weights": str(Path(first.checkpoint.directory) / "step_00000003")}
    sections: dict[str, Any] = {"parallel": TENSOR, "training": {"train_steps": 1}, "optimizer": {"warmup_steps": 0}}
    second = make_run(world, tmp_path / "second", **sections)
    second = replace(second, checkpoint=replace(second.checkpoint, **given))
    (state, _) = run_ranks(2, train_in_rank, second)
    assert state["step"] == state["loader"]["step"] == 1
    (record,) = records(second, "train")
    start = records(first, "train")[0]
    assert [record[name] for name in ("step", "samples", "tokens")] == [
        start[name] for name in ("step", "samples", "tokens")
    ]
    assert record["consumed_samples"] == record["samples"]
    assert record["loss"] < start["loss"]
    # The first step of Adam with fresh moments moves no number by more than lr * (1 + weight decay's share).
    before, after = whole(first, 3), whole(second, 1)
    for key in before:
        assert 0 < (after[key] - before[key]).abs().max() <= 1.01e-2 * (1 + 0.05 * before[key].abs().max()), key


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}])
def test_damaged_samples_are_skipped_counted_and_named(world: World, tmp_path: Path, layout: dict[str, Any]) -> None:
    """One in twenty: the run goes to its end, and counts what the plan says it met."""
    index = write_samples(tmp_path / "shards", "rotten", 40)
    source, damaged = Source(index), (5, 24)
    damage_text(source, damaged[0])
    damage_image(source, damaged[1], len(source.index.images_of(damaged[1])) - 1)
    sources, world_size = (SourceConfig(index=str(index)),), 2 if layout else 1
    config = make_run(world, tmp_path, data={"train_sources": sources}, training={"train_steps": 12}, parallel=layout)
    assert all(state["step"] == 12 for state in run_ranks(world_size, train_in_rank, config))
    found = records(config, "train")
    plan = plan_run(config, [source])
    met = [[sample.number for row in plan.step_rows(step) for sample in row.samples] for step in range(12)]
    assert [record["samples"] for record in found] == [len(numbers) for numbers in met]
    expected = [sum(number in damaged for number in numbers) for numbers in met]
    assert [record["failed_samples"] for record in found] == expected and sum(expected) >= 2
    listed = map(json.loads, (Path(config.logging.directory) / "failed_samples.jsonl").read_text().splitlines())
    named = Counter((line["step"], line["shard"], line["key"]) for line in listed)
    assert named == Counter(
        (step, source.shard_of(number), source.key(number))
        for step, numbers in enumerate(met, 1)
        for number in numbers
        if number in damaged
    )
    assert all(0 < record["loss"] < 20 for record in found)


def held_out_loss_in_rank(rank: int, world_size: int, config: NaViLConfig, checkpoint: Path) -> float:
    """The engine's loss on the held-out shards with the weights of a checkpoint."""
    with start_session(rank, world_size, config) as session:
        chunks = build_model(config, session.groups, session.device)
        CheckpointManager(config, session).load_weights(checkpoint, chunks)
        rows = ValidationLoader(config, config.evaluation.sources[0], place_of(session))
        return evaluate(config, session, chunks, rows)


@torch.inference_mode()
def exported_loss(world: World, folder: Path) -> float:
    """The same loss by transformers: every held-out sample through the exported folder's own processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    tokenizer = processor.tokenizer
    source = Source(world.validation_index)
    total, count = 0.0, 0
    for raw in (source.read(number) for number in range(len(source))):
        pictures = [Image.open(io.BytesIO(file)) for file in raw.images]
        text = "<image>" * len(pictures) + str(raw.content) + tokenizer.eos_token
        inputs = processor(images=pictures or None, text=text)
        num_predicted = len(tokenizer(str(raw.content))["input_ids"]) + 1
        labels = inputs["input_ids"].clone()
        labels[:, :-num_predicted] = -100
        # Nothing predicts the first token of a sample without a picture.
        num_predicted -= not pictures
        total += float(model(**inputs, labels=labels).loss) * num_predicted
        count += num_predicted
    return total / count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exported_folder_has_the_loss_of_the_engine(world: World, tmp_path: Path, precision: str) -> None:
    config = make_run(
        world,
        tmp_path,
        parallel=TENSOR,
        training={"train_steps": 4},
        precision={"type": precision},
        evaluation={},  # at the end alone
    )
    run_ranks(2, train_in_rank, config)
    folder = Path(config.checkpoint.directory)
    assert main(["convert", "to-hf", str(folder), str(tmp_path / "hf"), "--json"]) == 0
    found = exported_loss(world, tmp_path / "hf")
    in_fp32 = replace(config, precision=PrecisionConfig(type="fp32"))
    for expected in run_ranks(2, held_out_loss_in_rank, in_fp32, folder):
        torch.testing.assert_close(found, expected, **EXPORT)
    recorded = records(config, "evaluation")[-1]["loss"]
    assert recorded == pytest.approx(found, abs=EXPORT["atol"] if precision == "fp32" else 0.05)


def test_a_start_goes_past_a_damaged_checkpoint(world: World, tmp_path: Path) -> None:
    saving = {"directory": str(tmp_path / "checkpoints"), "save_every_steps": 2, "fall_back": True}
    config = make_run(world, tmp_path, training={"train_steps": 4}, checkpoint=saving)
    run_ranks(1, train_in_rank, config)
    (tmp_path / "checkpoints" / "step_00000004" / ".metadata").write_bytes(b"")
    run_ranks(1, train_in_rank, config)
    assert saved_steps(config) == ["step_00000002", "step_00000004", "step_00000004.damaged"]
    assert [record["step"] for record in records(config, "train")] == [1, 2, 3, 4, 3, 4]


def test_what_a_run_tells_without_a_terminal(world: World, tmp_path: Path) -> None:
    config = make_run(
        world,
        tmp_path,
        training={"train_steps": 2, "generate_every_steps": 2, "profile_steps": (2, 2)},
        evaluation={"every_steps": 2},
        logging={"progress": True},
    )
    path = write_toml(config, tmp_path / "run.toml")
    ((code, stderr),) = run_ranks(1, pretrain_in_rank, path)
    assert (code, error_lines(stderr)) == (0, [])
    (first,) = re.findall(r"step 1/2  loss .*", stderr)
    assert all(word in first for word in ("with_images", " tokens/s  ", " GB  ", "lr 0.005  ", "grad norm ", "left 0:"))
    (evaluation,) = records(config, "evaluation")
    assert f"evaluation at step 2: loss {evaluation['loss']:.4f}" in stderr
    lines = (Path(config.logging.directory) / "metrics.jsonl").read_text().splitlines()
    (run_id,) = {json.loads(line)["run"] for line in lines}
    assert json.loads((Path(config.logging.directory) / "run.json").read_text())["id"] == run_id

    logs = Path(config.logging.directory)
    assert "profile of steps 2 to 2" in stderr and re.search(r" ms +\d+\.\d% +\d+ x aten::", stderr)
    events = json.loads((logs / "profile" / "rank0.trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    text = (logs / "captions" / "step_00000002.txt").read_text()
    page = (logs / "captions" / "step_00000002.html").read_text()
    source = Source(world.validation_index)
    known = {source.key(number): source.read_content(number) for number in range(len(source))}
    asked = re.findall(r"^(\S+)\n  said    .*\n  sample  (.*)$", text, re.MULTILINE)
    assert asked and all(known[key] == caption and key in page and caption in page for key, caption in asked)
    assert page.count('<img src="data:image/jpeg;base64,') == len(asked)

    # Finished: it says so, and neither evaluates nor records anything again.
    ((code, stderr),) = run_ranks(1, pretrain_in_rank, path)
    assert (code, error_lines(stderr)) == (0, []) and "already at step 2 of 2" in stderr
    assert "evaluation at" not in stderr and "nan" not in stderr
    # Another run is not mixed into its records.
    ((code, stderr),) = run_ranks(1, pretrain_in_rank, path, f"checkpoint.directory='{tmp_path}/other'")
    (line,) = error_lines(stderr)
    assert code == EXIT_CODE and f"holds the records of another run ({run_id}" in line
    assert (Path(config.logging.directory) / "metrics.jsonl").read_text().splitlines() == lines
