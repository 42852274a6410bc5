"""What a user gets wrong: one clear line for each problem, exit code 2, never a traceback."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from navil_megatron.cli import main
from navil_megatron.config.data import SourceConfig
from navil_megatron.config.errors import EXIT_CODE
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.shards.shard_writer import ShardWriter
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import build_tokenizer
from tests.e2e.runs import (
    World,
    error_lines,
    make_run,
    pretrain_in_rank,
    records,
    start,
    train_in_rank,
    write_toml,
)
from tests.ranks import run_ranks
from tests.unit.data_examples import damage_image, example_tokenizer, picture, write_samples


@pytest.fixture
def run_file(world: World, tmp_path: Path) -> Path:
    """The config of a run that would work."""
    return write_toml(make_run(world, tmp_path), tmp_path / "run.toml")


def refused(config: Path, *overrides: str) -> str:
    """The one line with which a run on one rank is refused."""
    ((code, stderr),) = run_ranks(1, pretrain_in_rank, config, *overrides)
    assert code == EXIT_CODE, stderr
    (line,) = error_lines(stderr)
    return line


def holds(text: str, *words: str) -> None:
    """The message says all of it."""
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["training.train_step=3"], ["train_step", "train_steps"]),
        (["optimiser.lr=3"], ["optimiser", "optimizer"]),
        (['training.train_steps="many"'], ["training.train_steps", "many"]),
        (["precision.type=fp8"], ["precision.type", "fp8", "bf16", "fp32"]),
        (["optimizer.lr=-1"], ["optimizer.lr", "-1"]),
        (["parallel.tensor_model_parallel_size=3", "--nproc", "3"], ["tensor_model_parallel_size = 3", "1, 2, 4"]),
        (["parallel.tensor_model_parallel_size=2", "--nproc", "3"], ["world size 3", "2"]),
        (["training.global_batch_size=3", "--nproc", "2"], ["training.global_batch_size = 3", "2"]),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layers=[1,2]", "--nproc", "2"],
            ["[1, 2]", "3"],
        ),
    ],
)
def test_config_that_cannot_run(
    run_file: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: list[str]
) -> None:
    assert main(["train", str(run_file), *words]) == EXIT_CODE
    lines = error_lines(capsys.readouterr().err)
    assert lines
    holds(lines[0], *expected)


def test_every_problem_of_a_config_gets_its_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_toml(make_run(world, tmp_path), tmp_path / "run.toml")
    text = path.read_text().replace("seq_length = 128", 'seq_lenght = 128\nseq_length = "long"')
    path.write_text(text.replace("train_steps = 6\n", ""))
    assert main(["train", str(path)]) == EXIT_CODE
    lines = error_lines(capsys.readouterr().err)
    assert len(lines) == 3
    holds("\n".join(lines), str(path), "seq_lenght", "long", "train_steps")


def test_missing_or_broken_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "absent.toml")]) == EXIT_CODE
    (line,) = error_lines(capsys.readouterr().err)
    holds(line, str(tmp_path / "absent.toml"))
    (tmp_path / "broken.toml").write_text("[training\ntrain_steps = 3\n")
    assert main(["train", str(tmp_path / "broken.toml")]) == EXIT_CODE
    (line,) = error_lines(capsys.readouterr().err)
    holds(line, str(tmp_path / "broken.toml"), "line 1")


def sources(index: Path) -> str:
    """The override that trains on one index."""
    return f"data.train_sources=[{{index='{index}'}}]"


def test_missing_index(run_file: Path, tmp_path: Path) -> None:
    line = refused(run_file, sources(tmp_path / "none.index"))
    holds(line, str(tmp_path / "none.index"), "navil-megatron data index")


def test_checkpoints_that_cannot_be_written_are_found_before_the_first_step(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refused(run_file, f"checkpoint.directory='{tmp_path}/file/checkpoints'")
    holds(line, f"checkpoint.directory {tmp_path}/file/checkpoints cannot be written")
    assert not (tmp_path / "logs" / "metrics.jsonl").exists()


def test_missing_shard(run_file: Path, tmp_path: Path) -> None:
    index = write_samples(tmp_path / "shards", "gone", 4)
    (tmp_path / "shards" / "gone-000000.tar").unlink()
    holds(refused(run_file, sources(index)), str(tmp_path / "shards" / "gone-000000.tar"), "missing")


def test_truncated_shard(run_file: Path, tmp_path: Path) -> None:
    index = write_samples(tmp_path / "shards", "cut", 4)
    shard = tmp_path / "shards" / "cut-000000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    line = refused(run_file, sources(index))
    holds(line, str(shard), "damaged", str(len(content)), str(len(content) // 2), "navil-megatron data index")


def test_too_many_damaged_pictures(run_file: Path, tmp_path: Path) -> None:
    index = write_samples(tmp_path / "shards", "rotten", 30, per_shard=30)
    source = Source(index)
    for number in range(len(source)):
        if len(source.index.images_of(number)):
            damage_image(source, number)
    line = refused(run_file, sources(index), "data.max_failed_share=0.01")
    holds(line, "failed to decode", "data.max_failed_share = 0.01", "failed_samples.jsonl")


def write_captions(folder: Path, lengths: list[int]) -> Path:
    """An index over texts and pictures with captions of so many words."""
    with ShardWriter(folder, "captions", example_tokenizer(folder / "tokenizer")) as writer:
        for number, length in enumerate(lengths):
            writer.write(f"sample{number}", " ".join(["apple"] * length), [picture(40, 40, seed=number)])
    return writer.index


def test_caption_longer_than_the_row_is_left_out_and_named(world: World, tmp_path: Path) -> None:
    index = write_captions(tmp_path / "shards", [3, 4, 500, 2, 5])
    source = SourceConfig(index=str(index))
    config = make_run(world, tmp_path, data={"train_sources": (source,)}, training={"train_steps": 3})
    ((code, stderr),) = run_ranks(1, pretrain_in_rank, write_toml(config, tmp_path / "run.toml"))
    assert (code, error_lines(stderr)) == (0, [])
    named = [line for line in stderr.splitlines() if "left out" in line]
    holds(named[0], "205 of 1025 samples", "sample 2 of", str(index), "a row of 128 tokens")
    found = records(config, "train")
    assert all(record["loss"] > 0 and record["failed_samples"] == 0 for record in found)
    assert [record["refused_samples"] for record in found] == [205, 0, 0]


def test_captions_that_are_all_longer_than_the_row(run_file: Path, tmp_path: Path) -> None:
    index = write_captions(tmp_path / "shards", [400, 500])
    holds(refused(run_file, sources(index)), "no sample of data.train_sources fits a row of 128", "data.seq_length")


def test_missing_tokenizer(run_file: Path, tmp_path: Path) -> None:
    holds(refused(run_file, f"data.tokenizer='{tmp_path}/none'"), "tokenizer", f"{tmp_path}/none", "data.tokenizer")


def test_special_ids_of_another_tokenizer(run_file: Path, tmp_path: Path) -> None:
    other = build_tokenizer(["apple"] * 4, tmp_path / "other", vocab_size=260)
    line = refused(run_file, f"data.tokenizer='{tmp_path}/other'")
    holds(line, f"{tmp_path}/other", "model.special_token_ids", str(list(other.special_token_ids)))


def _wider(config: NaViLConfig) -> NaViLConfig:
    vision = replace(config.model.vision, ffn_hidden_size=44)
    return replace(config, model=replace(config.model, vision=vision))


def _other_phase(config: NaViLConfig) -> NaViLConfig:
    return replace(config, training=replace(config.training, phase="s1.1"))


def _other_data(config: NaViLConfig) -> NaViLConfig:
    data = replace(config.data, train_sources=config.data.train_sources * 2)
    return replace(config, data=data)


def _weights_of_none(config: NaViLConfig) -> NaViLConfig:
    folder = Path(config.checkpoint.directory).parent
    checkpoint = replace(config.checkpoint, directory=f"{folder}/new", initial_weights=f"{folder}/none")
    return replace(config, checkpoint=checkpoint)


def _weights_of_another_model(config: NaViLConfig) -> NaViLConfig:
    folder = config.checkpoint.directory
    return _wider(
        replace(config, checkpoint=replace(config.checkpoint, directory=folder + "2", initial_weights=folder))
    )


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> NaViLConfig:
    """A run that has a checkpoint."""
    config = make_run(world, tmp_path_factory.mktemp("trained"), training={"train_steps": 1, "phase": "s1.2"})
    config = replace(config, optimizer=replace(config.optimizer, warmup_steps=0))
    run_ranks(1, train_in_rank, config)
    return config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_wider, ["another model", "model.vision.ffn_hidden_size is 40 there, 44 here"]),
        (_weights_of_another_model, ["another model", "model.vision.ffn_hidden_size is 40 there, 44 here"]),
        (_weights_of_none, ["no checkpoint", "checkpoint.initial_weights"]),
        (_other_phase, ["training.phase is 's1.2' there, 's1.1' here", "checkpoint.initial_weights"]),
        (_other_data, ["cannot resume", "data.train_sources"]),
    ],
)
def test_checkpoint_that_does_not_fit(
    trained: NaViLConfig, tmp_path: Path, change: Callable[[NaViLConfig], NaViLConfig], expected: list[str]
) -> None:
    changed = change(trained)
    holds(refused(write_toml(changed, tmp_path / "run.toml"), "training.train_steps=2"), *expected)


def test_damaged_checkpoint(trained: NaViLConfig, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained.checkpoint.directory, folder)
    largest = max(folder.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:200])
    config = replace(trained, checkpoint=replace(trained.checkpoint, directory=str(folder)))
    line = refused(write_toml(config, tmp_path / "run.toml"), "training.train_steps=2")
    holds(line, str(folder / "step_00000001"), "damaged")


def in_a_shell(*words: str) -> tuple[int, str]:
    """The exit code and stderr of a command as a user types it."""
    process = start("-m", *words)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def test_mistyped_key_in_a_shell(run_file: Path) -> None:
    for module in (["navil_megatron.cli", "train"], ["navil_megatron.pretrain"]):
        code, stderr = in_a_shell(*module, str(run_file), "data.seq_lenght=64")
        assert code == EXIT_CODE
        (line,) = error_lines(stderr)
        assert stderr.splitlines() == [line]
        holds(line, "seq_lenght", "seq_length")


def test_missing_index_on_two_ranks_in_a_shell(world: World, tmp_path: Path) -> None:
    layout: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
    nowhere = SourceConfig(index=f"{tmp_path}/none.index")
    config = make_run(world, tmp_path, parallel=layout, data={"train_sources": (nowhere,)})
    path = write_toml(config, tmp_path / "run.toml")
    code, stderr = in_a_shell("navil_megatron.cli", "train", str(path), "--nproc", "2")
    assert code == EXIT_CODE, stderr
    (line,) = error_lines(stderr)
    holds(line, "none.index", "navil-megatron data index")
