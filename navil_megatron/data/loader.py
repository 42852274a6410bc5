"""The training data of one rank: its microbatches of every step, made ahead of time in background threads.

Nothing here remembers where it is but the step: the plan is a pure function of it, so a run resumes anywhere and at any
data-parallel size with the same global batches.
"""

import hashlib
import logging
from dataclasses import asdict
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import NaViLConfig
from navil_megatron.data.encode import SampleEncoder
from navil_megatron.data.microbatches import DataCounts, FailedSample, MicrobatchBuilder
from navil_megatron.data.packing import DataPlan, rank_rows
from navil_megatron.data.prefetch import Prefetch
from navil_megatron.data.shards import ShardSet, expand_shards
from navil_megatron.data.types import Microbatch

MIN_SAMPLES_TO_JUDGE = 200
"""The failed share is taken of at least this many samples, so that one bad file early on does not stop a run."""

logger = logging.getLogger(__name__)


class TrainLoader:
    """Iterates over steps; each gives this rank's microbatches of the global batch."""

    def __init__(
        self, config: NaViLConfig, dp_rank: int, dp_size: int, decode_pixels: bool, start_step: int = 0
    ) -> None:
        """Opens the shards, plans, and starts preparing ``start_step``.

        Args:
            config: the run.
            dp_rank: this rank among the data-parallel ranks.
            dp_size: data-parallel ranks.
            decode_pixels: this rank's stage needs ``pixel_values``.
            start_step: first step to hand out.

        Raises:
            UserError: shards or tokenizer are missing, damaged or do not fit.
        """
        self._config, self._dp_rank, self._dp_size = config, dp_rank, dp_size
        encoder = SampleEncoder(config)
        shards = ShardSet(expand_shards(config.data.train_shards, "data.train_shards"))
        sizes = encoder.measure(shards)
        self.rejected: str | None = encoder.describe_rejected(shards, sizes)
        """One line about samples that fit no row, or None."""
        self.num_rejected = int((~sizes.usable).sum())
        """Samples that fit no row."""
        if self.rejected is not None:
            logger.warning("%s", self.rejected)
        usable = sizes.usable.nonzero()[0]
        if not len(usable):
            raise UserError(f"no sample of data.train_shards can be used: {self.rejected or 'the shards are empty'}")
        self.plan = DataPlan(
            usable,
            sizes.num_text[usable],
            sizes.num_visual[usable],
            seq_length=config.data.seq_length,
            pad_segments_to=config.data.pad_segments_to,
            seed=config.training.seed,
        )
        self._fingerprints = {
            "sources": shards.fingerprint,
            "tokenizer": encoder.tokenizer.fingerprint,
            "image_plan": hashlib.sha256(repr(sorted(asdict(encoder.planner).items())).encode()).hexdigest()[:32],
        }
        self._builder = MicrobatchBuilder(config, shards, encoder, decode_pixels=decode_pixels)
        self.step = start_step
        """The step that comes next."""
        self.counts = DataCounts()
        """What this rank has handed out since it was opened."""
        self.failures: list[FailedSample] = []
        """Samples that were blank, in the order in which they came up."""
        self._prefetch = self._start_at(start_step)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> list[Microbatch]:
        """This rank's microbatches of the next step.

        Raises:
            UserError: too many samples failed, or a shard can no longer be read.
        """
        parts = next(self._prefetch)
        for _, counts, failures in parts:
            self.counts.add(counts)
            for failure in failures:
                logger.warning(
                    "step %d: %s: %s: %s; blank, no loss", self.step, failure.shard, failure.key, failure.reason
                )
            self.failures += failures
        self._check_failed_share()
        self.step += 1
        return [microbatch for microbatch, _, _ in parts]

    @property
    def wait_seconds(self) -> float:
        """How long the last step kept its consumer waiting."""
        return self._prefetch.wait_seconds

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self.plan.num_rows

    def seek(self, step: int) -> None:
        """Makes ``step`` the next one to hand out."""
        self._prefetch.close()
        self.step = step
        self._prefetch = self._start_at(step)

    def close(self) -> None:
        """Stops the background threads."""
        self._prefetch.close()

    def state(self) -> dict[str, int | str]:
        """What a checkpoint keeps: the next step, and everything that decides which samples it holds."""
        return {
            "step": self.step,
            "seed": self._config.training.seed,
            "global_batch_size": self._config.training.global_batch_size,
            "seq_length": self._config.data.seq_length,
            "pad_segments_to": self._config.data.pad_segments_to,
            **self._fingerprints,
        }

    def check_state(self, saved: dict[str, Any]) -> None:
        """Refuses a saved state under which the steps would hold other samples.

        Raises:
            UserError: the first thing that changed.
        """
        names = {
            "sources": "the training shards (data.train_shards)",
            "tokenizer": "the tokenizer (data.tokenizer)",
            "image_plan": "the image settings (data.min_image_pixels, max_image_pixels, multi_scale, ...)",
            "seed": "training.seed",
            "global_batch_size": "training.global_batch_size",
            "seq_length": "data.seq_length",
            "pad_segments_to": "data.pad_segments_to",
        }
        current = self.state()
        for key, name in names.items():
            if saved.get(key) != current[key]:
                raise UserError(
                    f"cannot resume: {name} changed since the checkpoint was saved ({key} was {saved.get(key)}, is "
                    f"{current[key]}): restore it, or start a new run with checkpoint.initial_weights"
                )

    def _start_at(self, step: int) -> Prefetch[list[tuple[Microbatch, DataCounts, list[FailedSample]]]]:
        data = self._config.data
        return Prefetch(self._make_step, step, None, num_threads=data.num_workers, num_ahead=data.prefetch_steps)

    def _make_step(self, step: int) -> list[tuple[Microbatch, DataCounts, list[FailedSample]]]:
        training = self._config.training
        rows = self.plan.step_rows(step, training.global_batch_size)
        mine = rank_rows(rows, self._dp_rank, self._dp_size, training.micro_batch_size)
        return [self._builder.build(group) for group in mine]

    def _check_failed_share(self) -> None:
        allowed = self._config.data.max_failed_share
        if self.counts.failed > allowed * max(self.counts.samples, MIN_SAMPLES_TO_JUDGE):
            last = self.failures[-1]
            raise UserError(
                f"{self.counts.failed} of {self.counts.samples} samples failed to decode, more than "
                f"data.max_failed_share = {allowed} (the last: {last.shard}: {last.key}: {last.reason}): "
                "mend or re-index the shards, or raise the share"
            )
