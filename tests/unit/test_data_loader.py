"""From shards to microbatches: the same batches for any number of ranks and after any restart, and damage survived."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import NaViLConfig
from navil_megatron.data.encode import SampleEncoder, SampleTooLongError
from navil_megatron.data.loader import MIN_SAMPLES_TO_JUDGE, TrainLoader
from navil_megatron.data.shard_index import index_path
from navil_megatron.data.shards import ShardSet, ShardWriter
from navil_megatron.data.types import Microbatch
from navil_megatron.data.validation import ValidationLoader, swapped_pictures
from tests.unit.data_examples import make_config, picture, write_samples

NUM_SAMPLES = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> NaViLConfig:
    folder: Path = tmp_path_factory.mktemp("data")
    shards = write_samples(folder, "train", NUM_SAMPLES)
    return make_config(folder, [str(shard) for shard in shards])


def take(loader: TrainLoader, num_steps: int) -> list[list[Microbatch]]:
    steps = [next(loader) for _ in range(num_steps)]
    loader.close()
    return steps


def same(left: Microbatch, right: Microbatch) -> bool:
    arrays = ("input_ids", "position_ids", "labels", "loss_weights", "visual_token_mask", "image_grid_thw")
    return (
        all(np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays)
        and left.segment_lengths == right.segment_lengths
        and left.sample_indices == right.sample_indices
        and left.pixel_values is not None
        and right.pixel_values is not None
        and torch.equal(left.pixel_values, right.pixel_values)
    )


def joined(microbatches: Sequence[Microbatch]) -> Microbatch:
    """Microbatches laid end to end."""
    first = microbatches[0]
    names = ("input_ids", "position_ids", "labels", "loss_weights", "visual_token_mask", "image_grid_thw")
    return replace(
        first,
        **{name: np.concatenate([getattr(part, name) for part in microbatches]) for name in names},
        segment_lengths=tuple(length for part in microbatches for length in part.segment_lengths),
        sample_indices=tuple(index for part in microbatches for index in part.sample_indices),
        pixel_values=torch.cat([part.pixel_values for part in microbatches if part.pixel_values is not None]),
        num_tokens=sum(part.num_tokens for part in microbatches),
    )


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(2, 1), (4, 2), (1, 4)])
def test_the_global_batch_is_the_same_for_any_ranks(config: NaViLConfig, dp_size: int, micro_batch_size: int) -> None:
    expected = [joined(step) for step in take(TrainLoader(config, 0, 1, True), 5)]
    training = replace(config.training, micro_batch_size=micro_batch_size)
    other = replace(config, training=training)
    ranks = [take(TrainLoader(other, rank, dp_size, True), 5) for rank in range(dp_size)]
    for step, whole in enumerate(expected):
        microbatches = [microbatch for rank in ranks for microbatch in rank[step]]
        assert len(microbatches) == 8 // micro_batch_size
        assert same(joined(microbatches), whole)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_run_resumes_at_any_step(config: NaViLConfig, num_workers: int) -> None:
    config = replace(config, data=replace(config.data, num_workers=num_workers, prefetch_steps=num_workers + 1))
    whole = take(TrainLoader(config, 0, 2, True), 12)
    loader = TrainLoader(config, 0, 2, True)
    assert 2 * loader.num_rows < 12 * 8  # the steps cross epochs
    for start in (0, 1, 5, 11):
        resumed = TrainLoader(config, 0, 2, True, start_step=start)
        loader.seek(start)
        for step in range(start, 12):
            for expected, found, sought in zip(whole[step], next(resumed), next(loader), strict=True):
                assert same(expected, found) and same(expected, sought)
        assert resumed.state()["step"] == loader.step == 12
        resumed.close()
    loader.close()


def test_microbatches_hold_what_the_shards_hold(config: NaViLConfig) -> None:
    shards = ShardSet([*config.data.train_shards])
    loader = TrainLoader(config, 0, 1, True)
    tokenizer = SampleEncoder(config).tokenizer
    seen: list[int] = []
    while len(seen) < NUM_SAMPLES:
        for batch in next(loader):
            start = 0
            for index, length in zip(batch.sample_indices, batch.segment_lengths, strict=False):
                ids = batch.input_ids[start : start + length]
                text = ids[batch.loss_weights[start : start + length].astype(bool).nonzero()[0] + 1]
                assert text[-1] == tokenizer.end_id
                caption = shards.caption(index)
                if shards.records[index]["image_bytes"]:
                    assert tokenizer.decode(text.tolist()) == caption
                else:  # nothing predicts the first token of text alone
                    assert caption.endswith(tokenizer.decode(text.tolist()))
                start += length
            assert batch.pixel_values is not None
            assert len(batch.pixel_values) == batch.image_grid_thw.prod(axis=1).sum()
            seen += batch.sample_indices
    counts = loader.counts
    loader.close()
    assert counts.samples == len(seen)
    assert counts.failed == 0 and loader.failures == []
    rows = counts.text_tokens + counts.visual_tokens + counts.padding_tokens
    assert rows == loader.step * 8 * config.data.seq_length
    assert counts.padding_share == counts.padding_tokens / rows < 0.15
    assert loader.plan.fill > 0.85
    assert loader.wait_seconds >= 0


def test_a_stage_without_the_encoder_gets_no_pixels(config: NaViLConfig) -> None:
    with_pixels, without = (take(TrainLoader(config, 0, 1, decode), 1)[0] for decode in (True, False))
    for left, right in zip(with_pixels, without, strict=True):
        assert right.pixel_values is None
        assert same(left, replace(right, pixel_values=left.pixel_values))


def damage_images(shards: Sequence[str], every: int) -> list[str]:
    """Overwrites the middle of every n-th image in place; gives the keys."""
    opened = ShardSet(list(shards))
    keys = []
    for index in range(0, len(opened), every):
        record = opened.records[index]
        if not record["image_bytes"]:
            continue
        keys.append(opened.key(index))
        with open(opened.shard_of(index), "r+b") as file:
            file.seek(int(record["image_offset"]))
            file.write(bytes(int(record["image_bytes"])))
    return keys


def test_damaged_images_become_blank_and_lose_their_loss_on_every_stage(tmp_path: Path) -> None:
    shards = [str(shard) for shard in write_samples(tmp_path, "train", NUM_SAMPLES)]
    config = make_config(tmp_path, shards)
    num_steps = 3
    whole = take(TrainLoader(config, 0, 1, True), num_steps)
    damaged = set(damage_images(shards, every=15))
    assert len(damaged) >= 3
    opened = ShardSet(shards)
    loaders = [TrainLoader(config, 0, 1, decode) for decode in (True, False)]
    for expected in whole:
        for left, blank, masked in zip(expected, *(next(loader) for loader in loaders), strict=True):
            assert np.array_equal(left.input_ids, blank.input_ids)
            assert np.array_equal(left.image_grid_thw, blank.image_grid_thw)
            assert np.array_equal(blank.loss_weights, masked.loss_weights)
            assert np.array_equal(blank.labels, masked.labels)
            assert left.pixel_values is not None and blank.pixel_values is not None and masked.pixel_values is None
            start, patch = 0, 0
            for index, length in zip(left.sample_indices, left.segment_lengths, strict=False):
                bad = opened.key(index) in damaged
                section = slice(start, start + length)
                assert bad != np.array_equal(left.loss_weights[section], blank.loss_weights[section])
                assert not bad or not blank.loss_weights[section].any()
                num_context = int((left.input_ids[section] == config.model.special_token_id("<IMG_CONTEXT>")).sum())
                pixels = slice(patch, patch + 4 * num_context)
                assert torch.equal(left.pixel_values[pixels], blank.pixel_values[pixels]) or bad
                assert not bad or bool((blank.pixel_values[pixels].abs() < 0.01).all())
                start, patch = start + length, pixels.stop
    for loader in loaders:
        loader.close()
        assert {failure.key for failure in loader.failures} == damaged
        assert loader.counts.failed == len(loader.failures)
        assert loader.failures[0].reason == "not a readable image file"
        assert loader.failures[0].shard in shards


def test_too_many_damaged_images_stop_the_run(tmp_path: Path) -> None:
    shards = [str(shard) for shard in write_samples(tmp_path, "train", NUM_SAMPLES)]
    config = make_config(tmp_path, shards)
    damage_images(shards, every=3)
    loader = TrainLoader(config, 0, 1, True)
    with pytest.raises(UserError, match=r"samples failed to decode, more than data.max_failed_share = 0.05 .*train-0"):
        while loader.counts.samples < 2 * MIN_SAMPLES_TO_JUDGE:
            next(loader)
    loader.close()
    assert loader.counts.failed == len(loader.failures) > 0.05 * MIN_SAMPLES_TO_JUDGE
    strict = replace(config, data=replace(config.data, max_failed_share=0.0))
    loader = TrainLoader(strict, 0, 1, True)
    with pytest.raises(UserError, match="max_failed_share = 0.0"):
        take(loader, 8)
    loader.close()


def test_a_shard_that_vanishes_surfaces_in_the_training_thread(tmp_path: Path) -> None:
    shards = write_samples(tmp_path, "train", NUM_SAMPLES)
    config = make_config(tmp_path, [str(shard) for shard in shards])
    loader = TrainLoader(config, 0, 1, True)
    next(loader)
    for shard in shards:
        shard.unlink()
    with pytest.raises(UserError, match="can no longer be opened"):
        take(loader, 8)
    with pytest.raises(StopIteration):  # and no later step is taken for the lost one
        next(loader)


def test_a_caption_longer_than_the_row_is_left_out_counted_and_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        for number in range(9):
            writer.write(f"k{number}", "red apple", picture(64, 64), "png")
        writer.write("long", "red apple " * 60, picture(64, 64), "png")
    shards = [str(path) for path in writer.shards]
    config = make_config(tmp_path, shards)
    loader = TrainLoader(config, 0, 1, True)
    message = r"1 of 10 samples are left out; the first: .*train-000000.tar: long needs \d+ tokens, but a row holds 128"
    assert loader.num_rejected == 1
    assert loader.rejected is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(loader.rejected)
    seen = {index for step in take(loader, 4) for batch in step for index in batch.sample_indices}
    assert seen == set(range(9))
    with pytest.raises(SampleTooLongError, match="long needs"):
        SampleEncoder(config).encode(ShardSet(shards), 9)
    short = replace(config, data=replace(config.data, seq_length=16))
    with pytest.raises(UserError, match="no sample of data.train_shards can be used: 10 of 10"):
        TrainLoader(short, 0, 1, True)


def test_a_changed_source_or_setting_is_refused_on_resume(config: NaViLConfig, tmp_path: Path) -> None:
    loader = TrainLoader(config, 0, 1, False)
    saved = loader.state()
    loader.check_state(saved)
    loader.close()
    assert all(isinstance(value, int | str) for value in saved.values())
    TrainLoader(config, 1, 2, True).check_state(saved)  # another number of ranks is welcome

    fewer = replace(config, data=replace(config.data, train_shards=config.data.train_shards[:1]))
    pixels = replace(config, data=replace(config.data, max_image_pixels=64 * 64))
    seed = replace(config, training=replace(config.training, seed=8))
    other_words = make_config(tmp_path, config.data.train_shards)
    for changed, name in (
        (fewer, r"the training shards \(data.train_shards\)"),
        (pixels, "the image settings"),
        (seed, "training.seed"),
    ):
        loader = TrainLoader(changed, 0, 1, False)
        with pytest.raises(UserError, match=f"cannot resume: {name}.* changed since the checkpoint was saved"):
            loader.check_state(saved)
        loader.close()
    TrainLoader(other_words, 0, 1, False).check_state(saved)  # the same tokenizer from another folder
    with pytest.raises(UserError, match="the tokenizer"):
        loader.check_state({**saved, "sources": loader.state()["sources"], "tokenizer": "0"})


def test_validation_covers_every_sample_once_on_any_ranks(config: NaViLConfig) -> None:
    wholes = []
    for dp_size in (1, 2, 3):
        loaders = [ValidationLoader(config, rank, dp_size, True) for rank in range(dp_size)]
        assert len({len(loader) for loader in loaders}) == 1
        batches = [batch for loader in loaders for batch in loader]
        assert sum(map(len, loaders)) == len(batches)
        wholes.append(sorted(index for batch in batches for index in batch.sample_indices))
        again = [batch for loader in loaders for batch in loader]
        assert all(same(left, right) for left, right in zip(batches, again, strict=True))
        assert sum(float(batch.loss_weights.sum()) for batch in batches) > 0
    assert wholes == [list(range(NUM_SAMPLES))] * 3
    assert loaders[0].num_samples == NUM_SAMPLES


def test_swapped_images_change_pixels_and_nothing_else(config: NaViLConfig) -> None:
    shards = ShardSet(list(config.data.validation_shards))
    swapped = swapped_pictures(shards)
    for index in range(NUM_SAMPLES):
        if shards.records[index]["image_bytes"]:
            assert shards.caption(int(swapped[index])) != shards.caption(index)
            assert shards.records[int(swapped[index])]["image_bytes"]
        else:
            assert swapped[index] == index
    plain, other = (ValidationLoader(config, 0, 1, True, swap_images=swap) for swap in (False, True))
    for left, right in zip(plain, other, strict=True):
        assert left.pixel_values is not None and right.pixel_values is not None
        assert same(left, replace(right, pixel_values=left.pixel_values))
        if len(left.pixel_values):
            assert not torch.equal(left.pixel_values, right.pixel_values)


def test_an_index_that_does_not_fit_its_shard_is_refused(tmp_path: Path) -> None:
    shard = write_samples(tmp_path, "train", 20)[0]
    config = make_config(tmp_path, [str(shard)], global_batch_size=1)
    index_path(shard).unlink()
    with pytest.raises(UserError, match="has no index"):
        TrainLoader(config, 0, 1, True)
