"""The training data of one rank: its microbatches of every step, made ahead of time in background threads.

Nothing here remembers where it is but the step: the plan is a pure function of it, so a run resumes anywhere and at any
data-parallel size with the same global batches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from typing import Any

from navil_megatron.blueprint.image_plan import ImagePlanner
from navil_megatron.config.data import RemoteConfig
from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.measure import Ruler
from navil_megatron.data.microbatches import MicrobatchBuilder
from navil_megatron.data.order import ORDER_VERSION
from navil_megatron.data.plan import DataPlan, Row
from navil_megatron.data.prefetch import Prefetch
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer, load_tokenizer
from navil_megatron.data.types import DataPlace, Microbatch, SampleId
from navil_megatron.files.hashes import fingerprint

MIN_SAMPLES_TO_JUDGE = 200
"""The failed share is taken of at least this many samples, or of all there are once they came, so that one bad file
early on does not stop a run."""

_DECISIVE = {
    "sources": "the training sources (data.train_sources: indexes, their order, weights)",
    "tokenizer": "the tokenizer (data.tokenizer)",
    "image_plan": "the image settings (data.min_image_pixels, max_image_pixels, multi_scale, ...)",
    "seed": "training.seed",
    "global_batch_size": "training.global_batch_size",
    "seq_length": "data.seq_length",
    "pad_segments_to": "data.pad_segments_to",
    "order": "the version that plans the order of samples",
}
"""What decides which samples a step holds, and the settings behind it."""


@dataclass(frozen=True, slots=True)
class StepData:
    """What one rank works on in one step."""

    microbatches: tuple[Microbatch, ...]
    imbalance: float  # work of the busiest data-parallel rank over the mean
    num_refused: int  # samples of the global order that fit no row and were left out on the way here


class TrainLoader:
    """Iterates over steps; each gives this rank's microbatches of the global batch."""

    def __init__(self, config: NaViLConfig, place: DataPlace, *, start_step: int = 0) -> None:
        """Opens the sources and starts preparing ``start_step``; UserError where sources or tokenizer do not fit."""
        self._config, self._place = config, place
        tokenizer = load_run_tokenizer(config)
        sources = open_train_sources(config, tokenizer)
        if place.dp_rank == 0:
            for source in sources:
                source.check_shards()
        self.plan = plan_run(config, sources)
        listed = zip(sources, config.data.train_sources, strict=True)
        mixture = [(source.index.fingerprint, setting.weight) for source, setting in listed]
        planner = ImagePlanner.from_config(config.data, config.model.vision)
        self._decisive: dict[str, int | str] = {
            "seed": config.training.seed,
            "global_batch_size": config.training.global_batch_size,
            "seq_length": config.data.seq_length,
            "pad_segments_to": config.pad_segments_to,
            "sources": fingerprint(repr(mixture)),
            "tokenizer": tokenizer.fingerprint,
            "image_plan": fingerprint(repr(sorted(asdict(planner).items()))),
            "order": ORDER_VERSION,
        }
        self._builder = MicrobatchBuilder(config, sources, tokenizer, place=place)
        self.step = start_step
        self.num_samples = 0  # samples that this rank has handed out since it was opened
        self.failed: set[SampleId] = set()  # those of them that failed to decode, on any rank of the replica
        self._num_distinct = sum(map(len, sources))
        self._prefetch = self._start_at(start_step)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> StepData:
        """This rank's share of the next step; UserError where a shard can no longer be read."""
        data = next(self._prefetch)
        self.num_samples += sum(len(microbatch.samples) for microbatch in data.microbatches)
        self.step += 1
        return data

    @property
    def wait_seconds(self) -> float:
        """How long the last step kept its consumer waiting."""
        return self._prefetch.wait_seconds

    def count_failed(self, failed: Iterable[SampleId]) -> None:
        """Notes samples that failed, on whatever rank of the replica; UserError where they become too many.

        One that fails again in the next epoch is still one.
        """
        self.failed.update(failed)
        allowed, num_seen = self._config.data.max_failed_share, min(self.num_samples, self._num_distinct)
        judged = num_seen if num_seen == self._num_distinct else max(num_seen, MIN_SAMPLES_TO_JUDGE)
        if len(self.failed) > allowed * judged:
            raise UserError(
                f"{len(self.failed)} of {num_seen} samples failed to decode, more than "
                f"data.max_failed_share = {allowed}; they are listed in failed_samples.jsonl in logging.directory: "
                "mend or index the shards anew, or raise the share"
            )

    def seek(self, step: int) -> None:
        """Makes ``step`` the next one to hand out."""
        self._prefetch.close()
        self.step = step
        self._prefetch = self._start_at(step)

    def close(self) -> None:
        """Stops the background threads."""
        self._prefetch.close()

    def state(self) -> dict[str, int | str]:
        """What a checkpoint keeps: where the next step begins, and everything that decides which samples it holds."""
        window, first_row = self.plan.anchor(self.step)
        return {"step": self.step, "window": window, "window_first_row": first_row, **self._decisive}

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken; UserError where steps would now hold other samples, and why."""
        for key, name in _DECISIVE.items():
            if saved.get(key) != self._decisive[key]:
                raise UserError(
                    f"cannot resume: {name} changed since the checkpoint was saved ({key} was {saved.get(key)}, is "
                    f"{self._decisive[key]}): restore it, or start a new run with checkpoint.initial_weights"
                )
        self._prefetch.close()  # or its threads would count from the old place
        self.plan.restore_anchor(int(saved["window"]), int(saved["window_first_row"]))
        self.seek(int(saved["step"]))

    def _start_at(self, step: int) -> Prefetch[StepData]:
        data = self._config.data
        return Prefetch(self._make_step, step, None, num_threads=data.num_workers, num_ahead=data.prefetch_steps)

    def rows_of_ranks(self, step: int) -> list[list[Row]]:
        """The rows of a step, counted from 0, by data-parallel rank."""
        return [self.plan.rank_step(step, rank, self._place.dp_size)[0] for rank in range(self._place.dp_size)]

    def build(self, rows: Sequence[Row]) -> tuple[Microbatch, ...]:
        """The microbatches of some rows of this rank."""
        return tuple(map(self._builder.build, batched(rows, self._config.training.micro_batch_size)))

    def _make_step(self, step: int) -> StepData:
        rows, imbalance, num_refused = self.plan.rank_step(step, self._place.dp_rank, self._place.dp_size)
        return StepData(self.build(rows), imbalance, num_refused)


def load_run_tokenizer(config: NaViLConfig) -> SampleTokenizer:
    """The tokenizer of a run, refused with a UserError where it is missing or does not fit the model."""
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.special_token_ids)
    if tokenizer.vocab_size > config.model.language.vocab_size:
        raise UserError(
            f"tokenizer {config.data.tokenizer} has ids up to {tokenizer.vocab_size - 1}, but "
            f"model.language.vocab_size is {config.model.language.vocab_size}: set it to {tokenizer.vocab_size} or more"
        )
    return tokenizer


def open_sources(indexes: Sequence[str], tokenizer: SampleTokenizer, remote: RemoteConfig) -> list[Source]:
    """The sources behind index files; UserError where one is missing, damaged or of another tokenizer."""
    sources = [Source(index, remote) for index in indexes]
    for source in sources:
        if source.index.tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"index {source.index.path} counts the tokens of another tokenizer ({source.index.tokenizer}, the "
                f"run's is {tokenizer.fingerprint}): make it anew with: navil-megatron data index --tokenizer"
            )
    return sources


def open_train_sources(config: NaViLConfig, tokenizer: SampleTokenizer) -> list[Source]:
    """Those of a run, in the order of its config."""
    return open_sources([source.index for source in config.data.train_sources], tokenizer, config.data.remote)


def plan_run(config: NaViLConfig, sources: Sequence[Source]) -> DataPlan:
    """The order of a run's training data; UserError where a source is empty."""
    indexes, weights = [source.index for source in sources], [source.weight for source in config.data.train_sources]
    return DataPlan(indexes, weights, Ruler(config), config.training.seed, config.training.global_batch_size)
