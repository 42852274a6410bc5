"""From shards to microbatches: the same batches for any number of ranks and after any restart, and damage survived."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from navil_megatron.config.data import SourceConfig
from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.assemble import drop_loss
from navil_megatron.data.loader import MIN_SAMPLES_TO_JUDGE, StepData, TrainLoader, load_run_tokenizer
from navil_megatron.data.shards.shard_index import BLOCK, ShardEntries, save_index
from navil_megatron.data.shards.shard_writer import ShardWriter
from navil_megatron.data.shards.source import Source
from navil_megatron.data.types import ALONE, DataPlace, Document, Microbatch, SampleId
from navil_megatron.data.validation import ValidationLoader, swapped_pictures
from tests.unit.data_examples import (
    damage_image,
    damage_text,
    example_tokenizer,
    make_config,
    picture,
    trust_images,
    write_samples,
)

NUM_SAMPLES = 60
LATER_STAGE = DataPlace(is_first_stage=False)
ARRAYS = ("input_ids", "position_ids", "labels", "loss_weights", "visual_token_mask", "image_grid_thw")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> NaViLConfig:
    folder: Path = tmp_path_factory.mktemp("data")
    return make_config(folder, write_samples(folder, "train", NUM_SAMPLES))


def take(loader: TrainLoader, num_steps: int) -> list[StepData]:
    steps = [next(loader) for _ in range(num_steps)]
    loader.close()
    return steps


def same(left: Microbatch, right: Microbatch) -> bool:
    return (
        all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ARRAYS)
        and left.segment_lengths == right.segment_lengths
        and left.samples == right.samples
        and left.pixel_values is not None
        and right.pixel_values is not None
        and torch.equal(left.pixel_values, right.pixel_values)
    )


def rows_of(steps: Iterable[StepData]) -> Counter[object]:
    """Every row of some ranks' microbatches of one row each, by what it holds."""
    microbatches = [microbatch for step in steps for microbatch in step.microbatches]
    return Counter(
        (
            m.samples,
            m.input_ids.tobytes(),
            m.labels.tobytes(),
            m.loss_weights.tobytes(),
            m.pixel_values.numpy().tobytes(),
        )
        for m in microbatches
        if m.pixel_values is not None
    )


def samples_of(microbatches: Iterable[Microbatch]) -> list[SampleId]:
    return [sample for microbatch in microbatches for sample in microbatch.samples]


@pytest.mark.parametrize("dp_size", [2, 4, 8])
def test_the_global_batch_is_the_same_for_any_ranks(config: NaViLConfig, dp_size: int) -> None:
    alone = take(TrainLoader(config, ALONE), 5)
    ranks = [take(TrainLoader(config, DataPlace(rank, dp_size)), 5) for rank in range(dp_size)]
    for step, whole in enumerate(alone):
        assert all(len(rank[step].microbatches) == 8 // dp_size for rank in ranks)
        assert rows_of(rank[step] for rank in ranks) == rows_of([whole])
        assert len({rank[step].imbalance for rank in ranks}) == 1
        assert 1.0 == whole.imbalance <= ranks[0][step].imbalance


def test_rows_of_a_microbatch_are_laid_end_to_end(config: NaViLConfig) -> None:
    wide = replace(config, training=replace(config.training, micro_batch_size=4))
    for single, joined in zip(take(TrainLoader(config, ALONE), 3), take(TrainLoader(wide, ALONE), 3), strict=True):
        assert len(joined.microbatches) == 2
        assert samples_of(single.microbatches) == samples_of(joined.microbatches)
        for name in ARRAYS:
            parts = [np.concatenate([getattr(m, name) for m in data.microbatches]) for data in (single, joined)]
            assert np.array_equal(*parts)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_run_resumes_at_any_step_and_any_size(config: NaViLConfig, num_workers: int) -> None:
    config = replace(config, data=replace(config.data, num_workers=num_workers, prefetch_steps=num_workers + 1))
    whole = take(TrainLoader(config, ALONE), 40)
    first = TrainLoader(config, ALONE)
    window = len(first.plan.window(0))
    assert window < 40 * 8  # the steps cross windows
    for stop in (0, 1, 5, 38):
        first.seek(stop)
        saved = first.state()
        ranks = [TrainLoader(config, DataPlace(rank, 2)) for rank in range(2)]
        for rank in ranks:
            rank.restore(saved)
        for step in range(stop, min(stop + 3, 40)):
            assert rows_of([next(rank) for rank in ranks]) == rows_of([whole[step]]) == rows_of([next(first)])
        assert ranks[0].state() == first.state()
        for rank in ranks:
            rank.close()
    first.close()


def test_microbatches_hold_what_the_shards_hold(config: NaViLConfig) -> None:
    source = Source(config.data.train_sources[0].index)
    loader = TrainLoader(config, ALONE)
    tokenizer = load_run_tokenizer(config)
    image_ids = [config.model.special_token_id(token) for token in ("<IMG_CONTEXT>", "<img>")]
    seen: list[SampleId] = []
    num_slots, num_padding = 0, 0
    for _ in range(20):
        for batch in next(loader).microbatches:
            for sample, start, length in zip(batch.samples, batch.sample_starts, batch.sample_lengths, strict=True):
                part = slice(start, start + length)
                content = source.read(sample.number, images=False).content
                learned = batch.labels[part][batch.loss_weights[part] > 0]
                assert learned[-1] in (tokenizer.end_id, tokenizer.hugging_face.convert_tokens_to_ids("<|im_end|>"))
                said = tokenizer.hugging_face.decode(learned.tolist(), skip_special_tokens=True)
                if isinstance(content, str):  # nothing predicts the first token of text alone
                    assert content == said if len(source.index.images_of(sample.number)) else content.endswith(said)
                else:
                    answers = [turn.parts[0] for turn in content if turn.role == "assistant"]
                    assert said == "".join(answer or "" for answer in answers)
            assert batch.pixel_values is not None and batch.vision_plan.is_mine.all()
            assert len(batch.pixel_values) == batch.image_grid_thw.prod(axis=1).sum()
            seen += batch.samples
            work, size = batch.workload, batch.input_ids.size
            assert work.visual_tokens == np.isin(batch.input_ids, image_ids).sum()
            assert work.text_tokens == batch.sample_tokens.sum() - work.visual_tokens
            num_slots, num_padding = num_slots + size, num_padding + size - work.num_tokens
    loader.close()
    assert set(seen) == {SampleId(0, number) for number in range(NUM_SAMPLES)}
    assert loader.num_samples == len(seen)
    assert num_slots == 20 * 8 * config.data.seq_length
    assert 0 < num_padding < 0.2 * num_slots
    assert loader.wait_seconds >= 0


def test_a_stage_without_the_encoder_gets_no_pixels_and_reads_no_image(config: NaViLConfig) -> None:
    with_pixels, without = (take(TrainLoader(config, place), 1)[0].microbatches for place in (ALONE, LATER_STAGE))
    for left, right in zip(with_pixels, without, strict=True):
        assert right.pixel_values is None
        assert same(left, replace(right, pixel_values=left.pixel_values))


def test_ranks_that_split_the_images_decode_each_scale_once(config: NaViLConfig) -> None:
    def half(rank: int) -> TrainLoader:
        return TrainLoader(config, DataPlace(tp_rank=rank, tp_size=2))

    whole, *halves = (take(loader, 2) for loader in (TrainLoader(config, ALONE), half(0), half(1)))
    for data, *parts in zip(whole, *halves, strict=True):
        for full, *shares in zip(data.microbatches, *(part.microbatches for part in parts), strict=True):
            assert np.array_equal(shares[0].vision_plan.is_mine, ~shares[1].vision_plan.is_mine)
            assert full.pixel_values is not None
            scales = np.split(full.pixel_values.numpy(), np.cumsum(full.image_grid_thw.prod(axis=1))[:-1])
            for share in shares:
                expected = [scale for scale, held in zip(scales, share.vision_plan.is_mine, strict=False) if held]
                assert share.pixel_values is not None
                assert np.array_equal(
                    share.pixel_values.numpy(), np.concatenate([full.pixel_values.numpy()[:0], *expected])
                )


def test_interleaved_documents_are_rows_like_any_others(tmp_path: Path) -> None:
    """Packed, at several scales, counted in their loss group, with loss on the text that is wanted."""
    tokenizer = example_tokenizer(tmp_path / "tokenizer")
    document = Document(("red ", None, " apple two", None, " star"))
    with ShardWriter(tmp_path, "train", tokenizer) as writer:
        for number in range(6):
            writer.write(f"k{number}", document, [picture(64, 64, seed=number), picture(90, 40, seed=number)])
        writer.write("text", "red apple")
    config = make_config(tmp_path, writer.index, seq_length=256)
    before, *behind = (len(tokenizer.encode(text)) for text in document.parts if text)
    for way, learned in (("all", before - 1 + sum(behind) + 1), ("after_image", sum(behind) + 1)):
        loader = TrainLoader(replace(config, data=replace(config.data, image_text_loss=way)), ALONE)
        (first, *_), found = take(loader, 1)[0].microbatches, Counter()
        assert len(first.samples) > 1 and max(map(len, first.image_grid_thw)) == 3 < len(first.image_grid_thw)
        for sample, start, length in zip(first.samples, first.sample_starts, first.sample_lengths, strict=True):
            part = slice(start, start + length)
            if sample.number < 6:
                assert first.loss_weights[part].sum() == learned
                assert first.visual_token_mask[part].sum() > 2
                assert not first.visual_token_mask[start] and not first.visual_token_mask[start + length - 1]
            assert {*first.loss_groups[part].tolist()} == {int(sample.number < 6)}
            found[sample.number < 6] += 1
        assert found[True]


def test_sources_are_mixed_by_their_weights(tmp_path: Path) -> None:
    web, talk = (write_samples(tmp_path, name, size, seed=size) for name, size in (("web", 60), ("talk", 30)))
    config = make_config(tmp_path, web, talk)
    sources = (SourceConfig(index=str(web), weight=1.0), SourceConfig(index=str(talk), weight=3.0))
    config = replace(config, data=replace(config.data, train_sources=sources))
    loader = TrainLoader(config, LATER_STAGE)
    rows = [row for window in range(3) for row in loader.plan.window(window)]
    loader.close()
    drawn = np.bincount(np.concatenate([row.sources for row in rows]))
    assert drawn.tolist() == pytest.approx([drawn.sum() / 4, drawn.sum() * 3 / 4], abs=1)


def damage(index: Path, every: int) -> set[str]:
    """Spoils one image of every n-th sample that has any; gives the keys."""
    source = Source(index)
    with_images = [n for n in range(0, len(source), every) if source.index.samples[n]["num_images"]]
    for number in with_images:
        damage_image(source, number, len(source.index.images_of(number)) - 1)
    return {source.key(number) for number in with_images}


@pytest.mark.parametrize("reason", ["image differs from the index", "not a readable image file"])
def test_damaged_images_become_blank_and_their_samples_can_lose_their_loss(tmp_path: Path, reason: str) -> None:
    index = write_samples(tmp_path, "train", NUM_SAMPLES)
    config = make_config(tmp_path, index)
    whole = take(TrainLoader(config, ALONE), 10)
    damaged = damage(index, every=14)
    if reason == "not a readable image file":
        trust_images(index)
    assert len(damaged) >= 4
    source, seen = Source(index), set()
    for expected, found in zip(whole, take(TrainLoader(config, ALONE), 10), strict=True):
        for left, right in zip(expected.microbatches, found.microbatches, strict=True):
            failures = right.failures
            assert all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ARRAYS)
            keys = [source.key(sample.number) for sample in left.samples]
            assert [keys[failure.position] for failure in failures] == [failure.key for failure in failures]
            assert {failure.key for failure in failures} == damaged.intersection(keys)
            assert {failure.reason for failure in failures} <= {reason}
            seen |= {failure.key for failure in failures}
            settled = drop_loss(right, [failure.position for failure in failures])
            for key, start, length in zip(keys, left.sample_starts, left.sample_lengths, strict=True):
                part = slice(start, start + length)
                kept = 0.0 if key in damaged else left.loss_weights[part]
                assert np.array_equal(settled.loss_weights[part], np.zeros(length, np.float32) + kept)
                assert (settled.labels[part] == (-100 if key in damaged else left.labels[part])).all()
            assert left.pixel_values is not None and right.pixel_values is not None
            differs = (left.pixel_values != right.pixel_values).any(dim=1)
            assert bool((right.pixel_values[differs] == 127).all()) and bool(differs.any()) == bool(failures)
    assert seen == damaged


def test_a_bad_byte_in_a_text_costs_its_sample(tmp_path: Path) -> None:
    """Images, places and lengths stay as planned, in documents and conversations, with their names and without."""
    index = write_samples(tmp_path, "train", NUM_SAMPLES)
    config = make_config(tmp_path, index)
    whole = take(TrainLoader(config, ALONE), 10)
    source = Source(index)
    names = {number: source.key(number) for number in (3, 4, 9, 14, 20)}
    for number in names:
        damage_text(source, number)
    with open(source.shard_of(3), "r+b") as shard:  # the tar's own header, which names the sample
        record = source.index.samples[3]
        shard.seek((int(record["text_block"]) - int(record["name_blocks"])) * BLOCK)
        shard.write(b"x")
    names[3] = "sample 3"
    seen = set()
    for stage in (ALONE, LATER_STAGE):
        for expected, found in zip(whole, take(TrainLoader(config, stage), 10), strict=True):
            for left, right in zip(expected.microbatches, found.microbatches, strict=True):
                assert left.samples == right.samples and left.segment_lengths == right.segment_lengths
                bad = {position for position, sample in enumerate(left.samples) if sample.number in names}
                assert {failure.position for failure in right.failures} == bad
                for failure in right.failures:
                    assert failure.reason == "text differs from the index"
                    assert failure.key == names[left.samples[failure.position].number]
                    seen.add(failure.key)
                for position, start in enumerate(left.sample_starts):
                    part = slice(start, start + left.sample_lengths[position])
                    if position in bad:
                        assert not right.loss_weights[part].any()
                        assert (right.labels[part] == -100).all()
                        assert right.visual_token_mask[part].sum() == left.visual_token_mask[part].sum()
                    else:
                        assert np.array_equal(left.input_ids[part], right.input_ids[part])
                        assert np.array_equal(left.loss_weights[part], right.loss_weights[part])
                if stage is ALONE:
                    assert left.pixel_values is not None and right.pixel_values is not None
                    assert np.array_equal(left.image_grid_thw, right.image_grid_thw)
    met = {sample.number for step in whole for microbatch in step.microbatches for sample in microbatch.samples}
    assert seen == {names[number] for number in met & names.keys()} and "sample 3" in seen and len(seen) >= 4


def test_too_many_failed_samples_stop_the_run(config: NaViLConfig) -> None:
    loader = TrainLoader(config, LATER_STAGE)
    next(loader)
    tolerated = [SampleId(0, number) for number in range(int(0.05 * MIN_SAMPLES_TO_JUDGE))]
    for _ in range(3):  # the same ones again in every epoch
        loader.count_failed(tolerated)
    assert loader.num_samples < NUM_SAMPLES
    with pytest.raises(UserError, match=r"11 of \d+ samples failed to decode, more than data.max_failed_share = 0.05"):
        loader.count_failed([SampleId(0, len(tolerated))])
    while loader.num_samples < NUM_SAMPLES:
        next(loader)
    loader.failed.clear()
    loader.count_failed(tolerated[:3])
    with pytest.raises(UserError, match="4 of 60 samples failed to decode"):  # all that there are
        loader.count_failed(tolerated[:4])
    loader.close()


def test_a_shard_that_vanishes_surfaces_in_the_training_thread(tmp_path: Path) -> None:
    index = write_samples(tmp_path, "train", NUM_SAMPLES, per_shard=2)
    loader = TrainLoader(make_config(tmp_path, index), ALONE)
    next(loader)
    for shard in tmp_path.glob("*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(UserError, match=r"shard .* is damaged"):
        take(loader, 100)
    with pytest.raises(StopIteration):  # and no later step is taken for the lost one
        next(loader)


def test_samples_longer_than_a_row_are_shrunk_or_left_out_and_counted(tmp_path: Path) -> None:
    tokenizer = example_tokenizer(tmp_path / "tokenizer")
    fitting = next(text for words in range(200) if tokenizer.count([text := "red " * words], [1])[0] >= 96)
    with ShardWriter(tmp_path, "train", tokenizer) as writer:
        for number in range(8):
            writer.write(f"k{number}", "red apple", [picture(64, 64)])
        writer.write("long", "red apple " * 200, [picture(64, 64)])
        writer.write("wide", fitting, [picture(128, 128)])  # 36 image tokens, 15 without its larger scale
    config = make_config(tmp_path, writer.index)
    config = replace(config, data=replace(config.data, max_image_pixels=128 * 128))
    loader = TrainLoader(config, ALONE)
    steps = take(loader, len(loader.plan.window(0)) // 8)
    seen = Counter(samples_of(microbatch for step in steps for microbatch in step.microbatches))
    assert set(seen) == {SampleId(0, number) for number in (*range(8), 9)}
    assert sum(step.num_refused for step in steps) == 103  # once an epoch of the window
    assert sum(microbatch.num_shrunk for step in steps for microbatch in step.microbatches) == seen[SampleId(0, 9)] > 0
    short = replace(config, data=replace(config.data, seq_length=8))
    loader = TrainLoader(short, ALONE)
    with pytest.raises(UserError, match=r"no sample of data.train_sources fits a row of 8 tokens"):
        next(loader)


def test_a_changed_source_or_setting_is_refused_on_resume(config: NaViLConfig, tmp_path: Path) -> None:
    loader = TrainLoader(config, LATER_STAGE)
    saved = loader.state()
    loader.restore(saved)
    loader.close()
    assert all(isinstance(value, int | str) for value in saved.values())
    assert len(saved) == 11

    other = write_samples(tmp_path, "train", NUM_SAMPLES, seed=1)
    (index,) = (source.index for source in config.data.train_sources)

    def with_sources(*sources: SourceConfig) -> NaViLConfig:
        return replace(config, data=replace(config.data, train_sources=sources))

    pixels = replace(config, data=replace(config.data, max_image_pixels=64 * 64))
    seed = replace(config, training=replace(config.training, seed=8))
    for changed, name in (
        (with_sources(SourceConfig(index=str(other))), r"the training sources \(data.train_sources"),
        (with_sources(SourceConfig(index=index), SourceConfig(index=index)), "the training sources"),
        (with_sources(SourceConfig(index=index, weight=2.0)), "the training sources"),
        (pixels, "the image settings"),
        (seed, "training.seed"),
    ):
        loader = TrainLoader(changed, LATER_STAGE)
        with pytest.raises(UserError, match=f"cannot resume: {name}.* changed since the checkpoint was saved"):
            loader.restore(saved)
        loader.close()


def test_an_index_of_another_tokenizer_is_refused(config: NaViLConfig, tmp_path: Path) -> None:
    from navil_megatron.data.tokenizer import build_tokenizer

    build_tokenizer(["other words"], tmp_path / "other", vocab_size=300)
    data = replace(config.data, tokenizer=str(tmp_path / "other"))
    ids = load_run_tokenizer_ids(tmp_path / "other")
    model = replace(config.model, special_token_ids=ids, language=replace(config.model.language, vocab_size=400))
    with pytest.raises(UserError, match="train.index counts the tokens of another tokenizer"):
        TrainLoader(replace(config, data=data, model=model), LATER_STAGE)


def load_run_tokenizer_ids(folder: Path) -> tuple[int, ...]:
    from navil_megatron.data.tokenizer import load_tokenizer

    return load_tokenizer(folder).special_token_ids


def test_validation_covers_every_sample_once_on_any_ranks(config: NaViLConfig) -> None:
    (index,) = config.evaluation.sources
    for dp_size in (1, 2, 3):
        loaders = [ValidationLoader(config, index, DataPlace(rank, dp_size)) for rank in range(dp_size)]
        assert len({len(loader) for loader in loaders}) == 1
        batches = [batch for loader in loaders for batch in loader]
        assert sum(map(len, loaders)) == len(batches)
        assert sorted(samples_of(batches)) == [SampleId(0, number) for number in range(NUM_SAMPLES)]
        again = [batch for loader in loaders for batch in loader]
        assert all(same(left, right) for left, right in zip(batches, again, strict=True))
    assert (loaders[0].num_samples, loaders[0].num_refused) == (NUM_SAMPLES, 0)


def test_swapped_images_change_pixels_and_nothing_else(config: NaViLConfig) -> None:
    (index,) = config.evaluation.sources
    source = Source(index)
    swapped = swapped_pictures(source)
    for number in range(NUM_SAMPLES):
        other = swapped(SampleId(0, number)).number
        assert len(source.index.images_of(other)) == len(source.index.images_of(number))
        if len(source.index.images_of(number)):
            assert source.read(other).content != source.read(number).content
        else:
            assert other == number
    plain, changed = (ValidationLoader(config, index, ALONE, swap_images=swap) for swap in (False, True))
    for left, right in zip(plain, changed, strict=True):
        assert left.pixel_values is not None and right.pixel_values is not None
        assert same(left, replace(right, pixel_values=left.pixel_values))
        if len(left.pixel_values):
            assert not torch.equal(left.pixel_values, right.pixel_values)


def test_tokens_that_do_not_fit_the_index_are_refused(tmp_path: Path) -> None:
    index = write_samples(tmp_path, "train", 20)
    found = Source(index).index
    samples = found.samples[:].copy()
    samples["text_tokens"][0] = 7777
    entries = ShardEntries(samples, found.images[:].copy(), found.shards[0], [])
    save_index(index, lambda: [entries], found.shards, found.tokenizer)
    loader = TrainLoader(replace(make_config(tmp_path, index, seq_length=8192)), ALONE)
    with pytest.raises(UserError, match=r"train00000 has \d+ tokens, but its index says \d+"):
        take(loader, 20)
