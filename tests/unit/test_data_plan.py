"""The plan: a pure function of seed and step, whatever the number of ranks and wherever a run resumes."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.config.errors import UserError
from navil_megatron.config.load import section_from_dict
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.measure import REFUSED, Ruler
from navil_megatron.data.plan import DataPlan, Row
from navil_megatron.data.shards.shard_index import SourceIndex
from tests.unit.config_examples import example_tables
from tests.unit.index_examples import random_index

BATCH = 16


def make_config(**data: object) -> NaViLConfig:
    tables = example_tables()
    tables["data"] |= {"seq_length": 512, "min_image_pixels": 1024, "max_image_pixels": 65_536, **data}
    return section_from_dict(NaViLConfig, tables, "a test")


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> list[SourceIndex]:
    folder = tmp_path_factory.mktemp("indexes")
    sizes = {"web": [120, 0, 333, 90, 200], "text": [150], "small": [7, 5]}
    return [
        random_index(folder / f"{name}.index", shards, seed, most_images=0 if name == "text" else 3)
        for seed, (name, shards) in enumerate(sizes.items())
    ]


def make_plan(indexes: list[SourceIndex], **options: int) -> DataPlan:
    return DataPlan(indexes, [6.0, 3.0, 1.0], Ruler(make_config()), **({"seed": 5, "batch_rows": BATCH} | options))


def content(rows: list[Row] | tuple[Row, ...]) -> list[tuple[object, ...]]:
    return [(tuple(map(tuple, row.samples)), tuple(row.dropped.tolist()), row.cost) for row in rows]


@settings(max_examples=8, deadline=None)
@given(dp_size=st.sampled_from([1, 2, 4, 8]), steps=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_step_holds_the_same_rows_for_any_number_of_ranks(
    indexes: list[SourceIndex], dp_size: int, steps: list[int]
) -> None:
    alone, ranks = make_plan(indexes), [make_plan(indexes) for _ in range(dp_size)]
    for step in steps:
        whole = content(alone.step_rows(step))
        shares = [content(plan.rank_step(step, rank, dp_size)[0]) for rank, plan in enumerate(ranks)]
        assert [len(share) for share in shares] == [BATCH // dp_size] * dp_size
        assert sorted(repr(row) for share in shares for row in share) == sorted(map(repr, whole))


@settings(max_examples=8, deadline=None)
@given(stops=st.lists(st.integers(0, 30), max_size=4), last=st.integers(30, 45))
def test_a_run_that_stops_and_resumes_anywhere_sees_what_an_unbroken_one_sees(
    indexes: list[SourceIndex], stops: list[int], last: int
) -> None:
    unbroken = make_plan(indexes)
    stops, plan = sorted(stops), make_plan(indexes)
    for step in range(last):
        if step in stops:
            anchor = plan.anchor(step)
            plan = make_plan(indexes)
            plan.restore_anchor(*anchor)
        assert content(plan.step_rows(step)) == content(unbroken.step_rows(step))


def test_an_anchor_is_what_counting_from_the_start_gives(indexes: list[SourceIndex]) -> None:
    plan = make_plan(indexes)
    for step in (0, 7, 44):
        anchored = make_plan(indexes)
        anchored.restore_anchor(*plan.anchor(step))
        assert anchored.anchor(step) == plan.anchor(step) == make_plan(indexes).anchor(step)
        assert content(anchored.step_rows(step)) == content(plan.step_rows(step))
        assert content(anchored.step_rows(0)) == content(plan.step_rows(0))  # before the anchor: from the start


def test_the_order_of_this_version_is_written_down(indexes: list[SourceIndex]) -> None:
    """A change of the order breaks every run that resumes: it must be meant, and then this digest changes with it."""
    digest = hashlib.sha256()
    for step in range(12):
        digest.update(repr(content(make_plan(indexes).step_rows(step))).encode())
    assert digest.hexdigest()[:16] == "dd46561734e1b6be"


def test_every_sample_comes_equally_often(indexes: list[SourceIndex]) -> None:
    plan = DataPlan(indexes[:1], [1.0], Ruler(make_config()), seed=1, batch_rows=BATCH)
    usable = Ruler(make_config()).measure(indexes[0], np.arange(743)).dropped != REFUSED
    per_window = plan.mixture.window_samples // 743
    for window in range(3):
        seen = np.concatenate([row.indices for row in plan.window(window)])
        assert np.bincount(seen, minlength=743).tolist() == (usable * per_window).tolist()


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.05, 20), min_size=3, max_size=3),
    batch_rows=st.sampled_from([1, 3, 16]),
    seed=st.integers(0, 3),
)
def test_in_an_epoch_every_sample_comes_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], weights: list[float], batch_rows: int, seed: int
) -> None:
    """At any size and weight, row by row and step by step; what fits no row is left out of every epoch."""
    folder, ruler = tmp_path_factory.mktemp("indexes"), Ruler(make_config(seq_length=384))
    sources = [random_index(folder / f"{number}.index", [size], number) for number, size in enumerate(sizes)]
    usable = [ruler.measure(index, np.arange(len(index))).dropped != REFUSED for index in sources]
    if not any(map(np.any, usable)):
        return
    plan = DataPlan(sources, weights[: len(sources)], ruler, seed, batch_rows)
    seen = [np.zeros(size, dtype=np.int64) for size in sizes]
    for step in range(-(-200 // batch_rows)):
        for row in plan.step_rows(step):
            for source, sample in row.samples:
                assert seen[source][sample] == seen[source][usable[source]].min(), "not before the others came"
                seen[source][sample] += 1


def test_small_sets_fill_their_rows(tmp_path: Path) -> None:
    """Not by an epoch in rows of its own, of which the last would be part empty."""
    ruler = Ruler(make_config(seq_length=2048))
    for size in (5, 40, 300):
        index = random_index(tmp_path / f"{size}.index", [size])
        rows = DataPlan([index], [1.0], ruler, 0, 1).window(0)
        tokens = 0
        for row in rows:
            measures = ruler.measure(index, row.indices)
            tokens += int(measures.num_text.sum() + measures.num_visual.sum())
        assert tokens > 0.93 * 2048 * len(rows), (size, tokens / 2048 / len(rows))


def test_rows_fit_and_are_measured_rightly(indexes: list[SourceIndex]) -> None:
    config = make_config()
    ruler, plan = Ruler(config), make_plan(indexes)
    for row in plan.window(0):
        tokens = np.zeros(2, dtype=np.int64)
        cost = 0
        for (source, index), dropped in zip(row.samples, row.dropped.tolist(), strict=True):
            measures = ruler.measure(indexes[source], np.array([index]))
            assert measures.dropped.tolist() == [dropped]
            tokens += [int(measures.num_text[0]), int(measures.num_visual[0])]
            cost += int(measures.cost[0])
        assert ruler.row_tokens(*tokens) <= config.data.seq_length
        assert cost == row.cost


def test_samples_that_fit_no_row_are_left_out_counted_and_named(
    indexes: list[SourceIndex], caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(seq_length=96, min_image_pixels=4096)
    ruler = Ruler(config)
    refused = int((ruler.measure(indexes[0], np.arange(743)).dropped == REFUSED).sum())
    assert 0 < refused < 743
    plan = DataPlan(indexes[:1], [1.0], ruler, seed=1, batch_rows=1)
    with caplog.at_level(logging.WARNING):
        num_rows = len(plan.window(0))
    times = plan.mixture.window_samples // 743
    assert sum(plan.rank_step(step, 0, 1)[2] for step in range(num_rows)) == times * refused
    assert f"{times * refused} of {times * 743} samples do not fit a row of 96 tokens" in caplog.text


def test_sources_of_which_nothing_fits_end_in_one_line(indexes: list[SourceIndex]) -> None:
    ruler = Ruler(make_config(seq_length=16))
    tiny = replace_text(indexes[1])
    plan = DataPlan([tiny], [1.0], ruler, seed=1, batch_rows=1)
    with pytest.raises(UserError, match="no sample of data.train_sources fits a row of 16 tokens"):
        plan.step_rows(0)


def replace_text(index: SourceIndex) -> SourceIndex:
    """The index with texts that are longer than any row."""
    index = SourceIndex(index.path)
    index.samples = index.samples[:].copy()
    index.samples["text_tokens"] = 1000
    return index


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    empty = random_index(tmp_path / "empty.index", [0, 0])
    with pytest.raises(UserError, match=r"empty.index holds no sample"):
        DataPlan([empty], [1.0], Ruler(make_config()), seed=1, batch_rows=1)


@pytest.mark.parametrize(("multi_scale", "seq_length"), [(True, 96), (False, 48)])
def test_a_long_sample_drops_as_few_scales_as_it_can(
    indexes: list[SourceIndex], multi_scale: bool, seq_length: int
) -> None:
    """Oracle: sample by sample with the planner of single images."""
    config = make_config(seq_length=seq_length, multi_scale=multi_scale)
    ruler, index = Ruler(config), indexes[0]
    measures = ruler.measure(index, np.arange(len(index)))
    kinds = set()
    for sample, record in enumerate(index.samples):
        first = int(record["first_image"])
        images = index.images[first : first + int(record["num_images"])]
        sizes = list(zip(images["height"].tolist(), images["width"].tolist(), strict=True))
        expected = REFUSED
        for dropped in range(12):
            scales = ruler.planner.plan_images(sizes, dropped)
            visual = sum(g.grid_height * g.grid_width for image in scales for g in image) // 4 + len(sizes)
            text = int(record["text_tokens"]) + ruler.planner.count_tokens(scales) - visual
            if text + -(-visual // 16) * 16 <= seq_length:
                expected = dropped
                break
        assert measures.dropped[sample] == expected
        if expected != REFUSED:
            assert (measures.num_text[sample], measures.num_visual[sample]) == (text, visual)
        kinds.add(expected)
    assert {REFUSED, 0, 1, 2} <= kinds, "the cases must be there to be told apart"


def test_the_measure_counts_what_the_cost_model_says(indexes: list[SourceIndex]) -> None:
    """FLOPs by hand for one sample of one image and one of text alone."""
    config = replace(make_config())
    language, vision = config.model.language, config.model.vision
    measures = Ruler(config).measure(indexes[0], np.arange(743))
    alone = int(np.flatnonzero(indexes[0].samples["num_images"] == 0)[0])
    tokens = int(measures.num_text[alone])
    weights = language.num_layers * (
        language.hidden_size * (2 * 32 + 2 * 16) + 3 * language.hidden_size * language.ffn_hidden_size
    )
    expected = 2 * tokens * (weights + language.hidden_size * language.vocab_size)
    expected += 2 * language.num_layers * 32 * tokens**2
    assert int(measures.cost[alone]) == expected
    assert vision.num_layers == 2  # the encoder's part is held against training's FLOPs in test_training_flops.py
