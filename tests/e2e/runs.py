"""Small real runs: shards of generated pictures, a tokenizer trained here, a tiny model, and what they leave behind."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from navil_megatron import pretrain
from navil_megatron.config.data import SourceConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.shards.build_shards import build_shards
from navil_megatron.data.tokenizer import build_tokenizer
from navil_megatron.training.loop import train
from tests.conftest import REPOSITORY
from tests.ranks import start_session, tiny_config
from tests.unit.data_examples import WORDS, picture, write_samples

NUM_TRAIN, NUM_HELD_OUT = 60, 14


@dataclass(frozen=True)
class World:
    """Data that every run may read and none may change."""

    folder: Path
    train_index: str
    validation_index: str
    tokenizer: str
    special_token_ids: tuple[int, ...]
    vocab_size: int


def build_world(folder: Path) -> World:
    """Training shards by the writer, held-out shards from picture files as ``navil-megatron data build`` makes them."""
    tokenizer = build_tokenizer([" ".join(WORDS)] * 4, folder / "tokenizer", vocab_size=320)
    train_index = write_samples(folder / "shards", "train", NUM_TRAIN)
    manifest = folder / "heldout.jsonl"
    lines: list[dict[str, str]] = []
    for number in range(NUM_HELD_OUT):
        name = f"heldout{number}.png"
        height, width = ((40, 64), (64, 33), (70, 96))[number % 3]
        (folder / name).write_bytes(picture(height, width, seed=1000 + number))
        words = " ".join(WORDS[(number + step) % len(WORDS)] for step in range(1 + number % 4))
        lines.append({"caption": words} | ({"image": name} if number % 7 else {}))
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = build_shards(manifest, folder / "shards", tokenizer, prefix="heldout")
    assert held_out["num_samples"] == NUM_HELD_OUT
    return World(
        folder=folder,
        train_index=str(train_index),
        validation_index=str(folder / "shards" / "heldout.index"),
        tokenizer=str(folder / "tokenizer"),
        special_token_ids=tokenizer.special_token_ids,
        vocab_size=tokenizer.vocab_size + tokenizer.vocab_size % 2,  # two ranks split it
    )


def make_run(world: World, folder: Path, **sections: dict[str, Any]) -> NaViLConfig:
    """A run over the world that writes into ``folder``; ``sections`` change fields, as in ``tiny_config``."""
    base = tiny_config().model
    model = replace(
        base,
        special_token_ids=world.special_token_ids,
        language=replace(base.language, vocab_size=world.vocab_size),
    )
    defaults: dict[str, dict[str, Any]] = {
        "data": {
            "train_sources": (SourceConfig(index=world.train_index),),
            "tokenizer": world.tokenizer,
            "seq_length": 128,
            "min_image_pixels": 32 * 32,
            "max_image_pixels": 64 * 96,
        },
        "training": {"train_steps": 6, "global_batch_size": 2},
        "evaluation": {"sources": (world.validation_index,)} if "evaluation" in sections else {},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "checkpoint": {"directory": str(folder / "checkpoints")},
        "logging": {"directory": str(folder / "logs"), "tensorboard": False, "progress": False},
    }
    merged = {name: defaults.get(name, {}) | sections.get(name, {}) for name in {*defaults, *sections}}
    return tiny_config(**({"model": model} | merged))


def train_in_rank(rank: int, world_size: int, config: NaViLConfig) -> dict[str, Any]:
    """One rank's whole life as ``pretrain.py`` lives it; gives the training state at its end, but for the run's id."""
    with start_session(rank, world_size, config) as session:
        return train(config, session).to_dict() | {"run_id": ""}


def pretrain_in_rank(_rank: int, _world_size: int, config: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and stderr of ``python -m navil_megatron.pretrain``, in a process that has torch loaded already."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = pretrain.main([str(config), *overrides])
    return code, stderr.getvalue()


def records(config: NaViLConfig, kind: str) -> list[dict[str, Any]]:
    """The records of a kind in ``metrics.jsonl``, without a last line that is still being written."""
    path = Path(config.logging.directory) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == kind]


def saved_steps(config: NaViLConfig) -> list[str]:
    """Names in the checkpoint folder."""
    folder = Path(config.checkpoint.directory)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def write_toml(config: NaViLConfig, path: Path) -> Path:
    """The config as the file that a user would write; settings that are off are left out."""
    lines: list[str] = []
    _write_table("", asdict(config), lines)
    path.write_text("\n".join(lines) + "\n")
    return path


def _write_table(name: str, fields: dict[str, Any], lines: list[str]) -> None:
    if name:
        lines.append(f"[{name}]")
    lines += [f"{key} = {_toml(value)}" for key, value in fields.items() if not isinstance(value, dict | None)]
    for key, value in fields.items():
        if isinstance(value, dict):
            _write_table(f"{name}.{key}".lstrip("."), value, lines)


def _toml(value: Any) -> str:
    """A value; JSON's strings, numbers and booleans are TOML's too."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def start(*words: str) -> subprocess.Popen[str]:
    """``python ...`` as from a shell in the checkout, one thread a rank; what it prints is kept."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def error_lines(stderr: str) -> list[str]:
    """The lines that speak to the user; there must be no traceback around them."""
    assert "Traceback" not in stderr, stderr
    return [line for line in stderr.splitlines() if line.startswith("error: ")]
