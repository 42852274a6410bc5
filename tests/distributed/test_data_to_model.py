"""From shards into the model at any layout: packed rows learn what their samples alone would, and one rank decodes."""

from dataclasses import replace
from pathlib import Path

import pytest

from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loader import TrainLoader
from navil_megatron.data.microbatches import MicrobatchBuilder
from navil_megatron.data.plan import Row
from navil_megatron.data.shards.source import Source
from navil_megatron.data.types import Microbatch
from navil_megatron.models.build import build_model
from navil_megatron.training.batch import place_of
from navil_megatron.training.failures import settle_failures
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.oracle import Outcome, _gradients, compare, global_loss, merge_sections
from tests.ranks import run_ranks, start_session, tiny_config
from tests.tolerances import RANKS
from tests.unit.data_examples import damage_image, damage_text, make_config, write_samples
from tests.whole import slices_of

BATCH_ROWS = 4
SECTIONS = {
    "optimizer": {"lr": 1e-2, "warmup_steps": 0, "epsilon": 1e-3},
    "training": {"global_batch_size": BATCH_ROWS},
}


def run_config(data: NaViLConfig, sections: dict) -> NaViLConfig:
    """The tiny fp32 model over the data of an example."""
    model = tiny_config().model
    vocabulary = data.model.language.vocab_size
    language = replace(model.language, vocab_size=vocabulary + vocabulary % 2, num_layers=4)
    model = replace(model, special_token_ids=data.model.special_token_ids, language=language)
    return replace(tiny_config(model=model, **merge_sections(SECTIONS, sections)), data=data.data)


def learn(
    rank: int, world_size: int, data: NaViLConfig, sections: dict, alone: bool = False
) -> tuple[Outcome, int, list[str]]:
    """One step on real data: what it learned, how many samples failed on the replica, and which this rank lists."""
    config = run_config(data, sections)
    with start_session(rank, world_size, config) as session:
        loader = TrainLoader(config, place_of(session))
        step = next(loader)
        loader.close()
        microbatches, failed = settle_failures(session, step.microbatches)
        if alone:
            microbatches = [sample_alone(loader, row, n) for row in _rows(loader) for n in range(len(row.samples))]
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        result = train_step(config, session, chunks, optimizer, microbatches, lr=1e-2)
        outcome = Outcome([global_loss(result, session)], [float(result.grad_norm)], [], [])
        if session.groups.dp.size() * session.groups.cp.size() == 1:
            outcome.gradients = _gradients(chunks)
        outcome.parameters = slices_of([chunk.module for chunk in chunks])
        return outcome, len(failed), [one.key for batch in microbatches for one in batch.failures]


def _rows(loader: TrainLoader) -> list[Row]:
    return loader.plan.step_rows(0)


def sample_alone(loader: TrainLoader, row: Row, number: int) -> Microbatch:
    """One sample of a row in a row of its own."""
    one = slice(number, number + 1)
    builder: MicrobatchBuilder = loader._builder
    return builder.build([Row(row.sources[one], row.indices[one], row.dropped[one], 0)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> NaViLConfig:
    folder = tmp_path_factory.mktemp("clean")
    return make_config(folder, write_samples(folder, "train", 40), global_batch_size=BATCH_ROWS)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> NaViLConfig:
    """The same, with an image lost in every third sample that has two, and in some that have one; and some texts."""
    folder: Path = tmp_path_factory.mktemp("damaged")
    index = write_samples(folder, "train", 40)
    source = Source(index)
    for number in range(0, 40, 4):
        images = len(source.index.images_of(number))
        if images:
            damage_image(source, number, images - 1)
    for number in range(0, 40, 6):
        damage_text(source, number)
    return make_config(folder, index, global_batch_size=BATCH_ROWS)


def test_packed_rows_teach_what_their_samples_alone_teach(data: NaViLConfig) -> None:
    ((packed, _, _),) = run_ranks(1, learn, data, {})
    ((alone, _, _),) = run_ranks(1, learn, data, {}, True)
    compare([packed], alone, **RANKS)


LAYOUTS = {
    "tp2-sp": (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "dp2": (2, {}),
    "cp2": (2, {"parallel": {"cp": 2}}),
    "tp2-sp-pp2": (4, {"parallel": {"tp": 2, "sequence_parallel": True, "pp": 2}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_that_share_the_images_learn_what_one_rank_learns(
    data: NaViLConfig, damaged: NaViLConfig, layout: str
) -> None:
    world_size, sections = LAYOUTS[layout]
    for clean, config in ((True, data), (False, damaged)):
        ((one, num_failed, listed),) = run_ranks(1, learn, config, {})
        assert (num_failed == 0) == clean and len(listed) == num_failed
        outcomes = run_ranks(world_size, learn, config, sections)
        compare([outcome for outcome, _, _ in outcomes], one, **RANKS)
        replicas = 2 if layout == "dp2" else 1
        assert sum(failed for _, failed, _ in outcomes) == num_failed * world_size // replicas
        assert sorted(name for _, _, names in outcomes for name in names) == sorted(listed), "each is listed once"
