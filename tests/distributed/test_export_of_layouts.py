"""What is exported does not tell at which layout it was trained: every file is that of one rank, bit for bit."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.config.checkpoint import CheckpointConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.distributed.test_layouts import BATCH, LAYOUTS, MODELS, ON_EVERY_MODEL
from tests.oracle import global_batch, merge_sections, oracle_config
from tests.ranks import run_ranks, start_session
from tests.unit.hf_examples import tiny_tokenizer, with_tokenizer

IN_CI = (
    ("tp2-sp", "composed"),
    ("pp2-uneven", "untied"),
    ("pp2-interleaved", "tied"),
    ("tp2-sp-pp2", "tied"),
    ("tp2-sp", "577 words"),
    ("ep2", "untied"),
    ("ep2-tp2-sp-distributed-optimizer", "untied"),
    ("dp2-distributed-optimizer", "windowed"),
)
# Recompute leaves no trace in a checkpoint.
IN_ALL = [(layout, "untied") for layout in LAYOUTS if "recompute" not in layout]
IN_ALL += [(layout, model) for model in MODELS for layout in ON_EVERY_MODEL if model != "untied"]
SOURCE_STEPS, SOURCE_LR = 2, 1e-2


def save(rank: int, world_size: int, config: NaViLConfig, source: Path | None) -> None:
    """Some updates from the start; or the weights of ``source`` and one update at rate 0, which must not change them
    on their way through the optimizer. Then a checkpoint.
    """
    with start_session(rank, world_size, config) as session:
        chunks = build_model(config, session.groups, session.device)
        manager = CheckpointManager(config, session)
        if source is not None:
            manager.load_weights(source, chunks)
        wrapped = wrap_ddp(config, session, chunks)
        optimizer = build_optimizer(config, wrapped, session)
        batch = global_batch(config, BATCH, session)
        share = len(batch) // session.groups.dp.size()
        mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
        for _ in range(SOURCE_STEPS if source is None else 1):
            train_step(config, session, wrapped, optimizer, mine, lr=SOURCE_LR if source is None else 0.0)
        manager.save(1, wrapped, optimizer, {"step": 1})


def exported(folder: Path, world_size: int, model: str, sections: dict, source: Path | None) -> dict[str, bytes]:
    """The files of the Hugging Face folder that a run at this layout ends in, but for the card, which names the run."""
    config = oracle_config(**merge_sections({"model": MODELS[model]}, sections))
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    config = dataclasses.replace(
        config,
        model=with_tokenizer(config.model, tokenizer),
        checkpoint=CheckpointConfig(directory=str(folder / "checkpoints")),
    )
    run_ranks(world_size, save, config, source)
    convert_to_hf(folder / "checkpoints", folder / "hf", tokenizer=folder / "tokenizer")
    return {path.name: path.read_bytes() for path in (folder / "hf").iterdir() if path.name != "README.md"}


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, bytes], Path]]:
    """For a kind of model: the export of a lone rank that trained, and its checkpoints."""

    @functools.cache
    def export(model: str) -> tuple[dict[str, bytes], Path]:
        folder = tmp_path_factory.mktemp(model)
        return exported(folder, 1, model, {}, None), folder / "checkpoints"

    return export


def check(layout: str, model: str, expected: dict[str, bytes], source: Path, tmp_path: Path) -> None:
    world_size, sections = LAYOUTS[layout]
    found = exported(tmp_path, world_size, model, sections, source)
    assert "model.safetensors" in expected
    assert found.keys() == expected.keys()
    assert [name for name, content in expected.items() if found[name] != content] == []


@pytest.mark.parametrize(("layout", "model"), IN_CI)
def test_export_equals_that_of_one_rank_bit_for_bit(
    layout: str, model: str, of_one_rank: Callable, tmp_path: Path
) -> None:
    check(layout, model, *of_one_rank(model), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "model"), [pair for pair in IN_ALL if pair not in IN_CI])
def test_export_of_every_other_layout(layout: str, model: str, of_one_rank: Callable, tmp_path: Path) -> None:
    check(layout, model, *of_one_rank(model), tmp_path)
