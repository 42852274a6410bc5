"""Rows as arrays: labels, weights, positions, and padding that belongs to one modality at a time."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.blueprint.image_plan import ScalePlan, image_token_ids
from navil_megatron.config.load import load_config
from navil_megatron.config.model import ModelConfig
from navil_megatron.data.assemble import MAX_PADDING_SEGMENT, RowFormat, assemble, drop_loss
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.types import ALONE, EncodedSample, PackedSequence, SampleId
from tests.unit.config_examples import EXAMPLE_TOML
from tools.bench.synthetic import synthetic_microbatch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path: Path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(EXAMPLE_TOML)
    return load_config(path, []).model


def test_one_row_by_hand(model: ModelConfig) -> None:
    context, end_image, start, line, frame = (
        model.special_token_id(token)
        for token in ("<IMG_CONTEXT>", "</img>", "<img>", "<IMG_LINE_BREAK>", "<IMG_FRAME_BREAK>")
    )
    scale = ScalePlan(30, 60, 2, 4)
    image = image_token_ids([scale], 2, model.special_token_ids)
    assert image.tolist() == [start, context, context, line, frame, end_image]
    with_image = EncodedSample(
        SampleId(0, 3), np.array([*image, 7, 8]), np.array([0] * 6 + [1, 0.5], np.float32), ((scale,),)
    )
    text_alone = EncodedSample(SampleId(1, 9), np.array([5, 6]), np.array([0, 1], np.float32), ())
    row_format = RowFormat(seq_length=16, pad_segments_to=4, pad_id=1, special_token_ids=model.special_token_ids)
    rows = assemble([PackedSequence((with_image, text_alone), 16)], row_format)
    batch = plan_microbatch(rows, model, ALONE)
    assert batch.input_ids.tolist() == [*image, 7, 8, 5, 6, 1, 1, 1, 1, 1, 1]
    assert batch.labels.tolist() == [-100] * 5 + [7, 8, -100, 6, -100] + [-100] * 6
    assert batch.loss_weights.tolist() == [0] * 5 + [1, 0.5, 0, 1, 0] + [0] * 6
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 0, 1, 2, 3, 4]
    assert batch.visual_token_mask.nonzero()[0].tolist() == [0, 1, 2, 10]
    assert batch.segment_lengths == (8, 2, 1, 5)
    assert batch.image_grid_thw.tolist() == [[1, 2, 4]]
    assert (batch.num_tokens, batch.samples, batch.pixel_values) == (10, (SampleId(0, 3), SampleId(1, 9)), None)
    assert (batch.sample_starts, batch.sample_lengths) == ((0, 8), (8, 2))
    assert (batch.num_visual_tokens, batch.image_rows.tolist()) == (3, [12 + 1, 12 + 2])
    assert batch.loss_groups.tolist() == [1] * 8 + [2] * 2 + [0] * 6
    assert batch.workload.num_predictions == 3

    failed = drop_loss(batch, {0})
    assert np.array_equal(failed.input_ids, batch.input_ids)
    assert failed.labels.tolist() == [-100] * 8 + [6] + [-100] * 7
    assert failed.loss_weights.sum() == 1


def test_a_row_that_is_over_full_is_an_error(model: ModelConfig) -> None:
    with pytest.raises(ValueError, match="a row of 32 tokens is over-full by 1"):
        synthetic_microbatch(model, 32, 0, [[(33, [])]])


samples = st.tuples(
    st.integers(1, 20),
    st.lists(st.tuples(st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8])), max_size=2),
)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(samples, max_size=3), min_size=1, max_size=3), pad=st.sampled_from([8, 16, 128]))
def test_every_row_keeps_the_rules(model: ModelConfig, rows: list, pad: int) -> None:
    length = 1024
    batch = synthetic_microbatch(model, length, 0, rows, pad)
    assert len(batch.input_ids) == length * len(rows) == sum(batch.segment_lengths)
    special = np.isin(batch.input_ids, [model.special_token_id("<IMG_CONTEXT>"), model.special_token_id("<img>")])
    assert batch.visual_token_mask[special].all()
    bounds = np.cumsum([0, *batch.segment_lengths])
    for start, end in pairwise(bounds):
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        assert batch.labels[end - 1] == -100  # nothing predicts across a boundary
        trained = batch.labels[start : end - 1] != -100
        assert (batch.labels[start : end - 1] == batch.input_ids[start + 1 : end])[trained].all()
        assert start // length == (end - 1) // length  # no segment spans rows
    assert ((batch.labels == -100) == (batch.loss_weights == 0)).all()
    for number, row in enumerate(rows):
        mask = batch.visual_token_mask[number * length : (number + 1) * length]
        assert mask.sum() % pad == 0 and (~mask).sum() % pad == 0
        used = sum(s for s in batch.segment_lengths[: len(row)]) if number == 0 else None
        if used is not None:  # text follows visual padding to the end of the row
            padding = mask[used:]
            assert (np.diff(padding.astype(int)) <= 0).all() and padding.sum() < pad
    patches = sum(height * width for row in rows for _, grids in row for height, width in grids)
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (patches, 768)
    assert batch.image_grid_thw.prod(axis=1).sum() == patches
    assert int((batch.input_ids == model.special_token_id("<IMG_CONTEXT>")).sum()) == patches // 4


@pytest.mark.parametrize("composition", [[(20, [])], [(1, [(4, 4)])], []], ids=["text", "image", "empty"])
def test_a_modality_may_be_absent(model: ModelConfig, composition: list) -> None:
    batch = synthetic_microbatch(model, 1024, 1, [composition])
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape[0] == batch.image_grid_thw.prod(axis=1).sum()
    assert max(batch.segment_lengths[len(composition) :]) == MAX_PADDING_SEGMENT
    assert batch.visual_token_mask.any() == any(grids for _, grids in composition)


def test_the_seed_decides_a_synthetic_batch(model: ModelConfig) -> None:
    first, same, other = (synthetic_microbatch(model, 128, seed, [[(20, [(4, 4)])]]) for seed in (0, 0, 1))
    assert np.array_equal(first.input_ids, same.input_ids) and not np.array_equal(first.input_ids, other.input_ids)
    assert first.pixel_values is not None and same.pixel_values is not None
    assert bool((first.pixel_values == same.pixel_values).all())
