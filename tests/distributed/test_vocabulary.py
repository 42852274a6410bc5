"""Any number of words at any tensor-parallel size: 577, a prime, pads every rank or leaves one of four without a word.

What is expected is of one rank; that its padding changes nothing, ``test_loss_head`` and the golden files hold.
"""

from pathlib import Path

import pytest
import torch

from navil_megatron.blueprint.vocabulary import held_rows, words_of_rank
from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.config.load import config_to_dict
from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.distributed.test_checkpoint_layouts import check_pair
from tests.distributed.test_evaluate_and_generate import outcome
from tests.distributed.test_layouts import BATCH, LAYOUTS, LAYOUTS_OF_FOUR_GROUPS, MODELS, check
from tests.oracle import global_batch, merge_sections, oracle_config
from tests.ranks import run_ranks, start_session
from tests.tolerances import RANKS
from tests.whole import assemble, read_whole, slices_of
from tests.whole_checkpoint import write_tensors

KINDS = ("577 words", "577 words, tied")
PLACES = {**LAYOUTS, **LAYOUTS_OF_FOUR_GROUPS, "one-rank": (1, {})}


def at(layout: str, model: str) -> tuple[int, dict]:
    """Ranks and sections."""
    world_size, sections = PLACES[layout]
    return world_size, merge_sections({"model": MODELS[model]}, sections)


def tables(session, chunks) -> list[tuple[torch.nn.Parameter, range]]:
    """What this rank holds of embedding and head, and which words."""
    words = words_of_rank(577, session.groups.tp.rank(), session.groups.tp.size())
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    return [
        (weight, words) for name, weight in named if name.endswith(("word_embeddings.weight", "output_layer.weight"))
    ]


def test_rows_of_ranks() -> None:
    for size, ranks, rows in ((577, 1, 640), (577, 4, 256), (92_556, 1, 92_672), (92_556, 8, 11_648), (128, 1, 128)):
        assert held_rows(size, ranks) == rows
        held = [words_of_rank(size, rank, ranks) for rank in range(ranks)]
        assert [word for words in held for word in words] == list(range(size))
        assert all(len(words) <= rows for words in held)
        # A rank is full before the next one has a word: words are where megatron-core's embedding looks for them.
        assert all(words.start == rank * rows for rank, words in enumerate(held) if words)


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize(
    "layout", ["tp2", "tp4", "tp4-sp", "dp2-distributed-optimizer", "tp2-sp-dp2-distributed-optimizer"]
)
def test_layout_equals_one_rank(layout: str, model: str) -> None:
    """Others are among the main layouts of ``test_layouts``."""
    check(layout, model=model)


def padding_after_steps(rank: int, world_size: int, sections: dict) -> list[float]:
    """The largest number behind the words in weights and gradients, and how many rows that is."""
    config = oracle_config(**merge_sections(sections, {"optimizer": {"weight_decay": 0.1}}))
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model)
        optimizer = build_optimizer(config, chunks, session)
        batch = global_batch(config, BATCH, session)
        share = len(batch) // session.groups.dp.size()
        mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
        for _ in range(2):
            train_step(config, session, chunks, optimizer, mine, lr=1e-2)
        held = tables(session, model)
        assert held
        for weight, words in held:
            assert weight.shape[0] == held_rows(577, session.groups.tp.size())
            assert not weight[len(words) :].any()
            assert not weight.main_grad[len(words) :].any()
            assert not words or weight[: len(words)].any(dim=1).all()
        return [len(weight) - len(words) for weight, words in held]


@pytest.mark.parametrize("model", KINDS)
def test_padding_stays_zero(model: str) -> None:
    num_tables = 1 if "tied" in model else 2
    world_size, sections = at("tp4-sp", model)
    found = run_ranks(world_size, padding_after_steps, {**sections, "precision": {"type": "bf16"}})
    assert found == [[padding] * num_tables for padding in (0, 0, 191, 256)]


@pytest.mark.parametrize(
    ("source", "target", "model"),
    [
        ("tp4-sp", "tp2-sp-pp2", "577 words"),
        ("tp2-sp-dp2-distributed-optimizer", "tp4", "577 words, tied"),
        ("tp4", "one-rank", "577 words, tied"),
    ],
)
def test_checkpoints_hold_words_alone(source: str, target: str, model: str, tmp_path: Path) -> None:
    check_pair(at(source, model), at(target, model), tmp_path)
    saved = read_whole(next((tmp_path / "first").glob("step_*")))
    assert {len(tensor) for key, tensor in saved.items() if "word_embeddings" in key or "output_layer" in key} == {577}


def slices(rank: int, world_size: int, sections: dict, converted: Path | None) -> list:
    """What ranks hold of a model drawn by the seed; or of one that is read into ranks full of other numbers."""
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        if converted is not None:
            for weight, _ in tables(session, model):
                weight.data.fill_(7.0)
            CheckpointManager(config, session).load_weights(converted, model)
            assert not any(weight[len(words) :].any() for weight, words in tables(session, model))
        return slices_of(model)


def test_the_seed_and_converted_weights_give_the_same_words_at_any_size(tmp_path: Path) -> None:
    sections = at("one-rank", "577 words")[1]
    whole = assemble(*run_ranks(1, slices, sections, None))
    config = oracle_config(**sections)
    (tmp_path / "converted").mkdir()
    write_tensors(tmp_path / "converted", whole, config.model, config_to_dict(config)["data"])
    for converted in (None, tmp_path / "converted"):
        for found in run_ranks(4, slices, at("tp4-sp", "577 words")[1], converted):
            for key, _, index, values in found:
                assert torch.equal(values, whole[key][index]), key


def test_evaluation_and_generation_equal_one_rank() -> None:
    ((loss, texts, _),) = run_ranks(1, outcome, at("one-rank", "577 words")[1])
    for found_loss, found_texts, _ in run_ranks(4, outcome, at("tp4-sp", "577 words")[1]):
        torch.testing.assert_close(found_loss, loss, **RANKS)
        assert found_texts == texts
