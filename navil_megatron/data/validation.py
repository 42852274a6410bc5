"""Held-out data: fixed rows, the same at every evaluation and for any number of ranks.

With ``swap_images`` each sample shows another sample's picture: a model that reads its images must do worse on it.
"""

from collections.abc import Iterator

import numpy as np

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import NaViLConfig
from navil_megatron.data.encode import SampleEncoder
from navil_megatron.data.microbatches import FailedSample, MicrobatchBuilder
from navil_megatron.data.packing import DataPlan, rank_rows
from navil_megatron.data.prefetch import Prefetch
from navil_megatron.data.shards import ShardSet, expand_shards
from navil_megatron.data.types import Microbatch

_NEIGHBOURS = 64
"""Samples of the next larger pictures among which a swap is looked for."""


class ValidationLoader:
    """Iterates over this rank's microbatches of the held-out set; every iteration starts from the front."""

    def __init__(
        self, config: NaViLConfig, dp_rank: int, dp_size: int, decode_pixels: bool, *, swap_images: bool = False
    ) -> None:
        """Opens ``data.validation_shards``; arguments as of ``TrainLoader``.

        Raises:
            UserError: shards or tokenizer are missing, damaged or do not fit.
        """
        encoder = SampleEncoder(config)
        shards = ShardSet(expand_shards(config.data.validation_shards, "data.validation_shards"))
        sizes = encoder.measure(shards)
        self.rejected: str | None = encoder.describe_rejected(shards, sizes)
        """One line about samples that fit no row, or None."""
        usable = sizes.usable.nonzero()[0]
        if not len(usable):
            raise UserError(f"no sample of data.validation_shards can be used: {self.rejected or 'they are empty'}")
        plan = DataPlan(
            usable,
            sizes.num_text[usable],
            sizes.num_visual[usable],
            seq_length=config.data.seq_length,
            pad_segments_to=config.data.pad_segments_to,
            seed=0,
        )
        self.num_samples = len(usable)
        """Held-out samples, over all ranks."""
        rows = [plan.row(number) for number in range(plan.num_rows)]
        # every rank must run the same number of forward passes: empty rows, all padding and no loss, even them out
        rows += [usable[:0]] * (-len(rows) % (dp_size * config.training.micro_batch_size))
        self._groups = rank_rows(rows, dp_rank, dp_size, config.training.micro_batch_size)
        pictures_of = swapped_pictures(shards) if swap_images else None
        self._builder = MicrobatchBuilder(config, shards, encoder, decode_pixels=decode_pixels, pictures_of=pictures_of)
        self._data = config.data
        self.failures: list[FailedSample] = []
        """Samples that were blank in the last iteration."""

    def __len__(self) -> int:
        """Microbatches of one iteration."""
        return len(self._groups)

    def __iter__(self) -> Iterator[Microbatch]:
        """This rank's microbatches, first to last."""
        self.failures = []
        prefetch = Prefetch(
            lambda number: self._builder.build(self._groups[number]),
            0,
            len(self._groups),
            num_threads=self._data.num_workers,
            num_ahead=self._data.prefetch_steps,
        )
        try:
            for microbatch, _, failures in prefetch:
                self.failures += failures
                yield microbatch
        finally:
            prefetch.close()


def swapped_pictures(shards: ShardSet) -> np.ndarray:
    """[n] int64: for each sample another one with a different caption, of the same picture size where there is one."""
    captions = [shards.caption(index) for index in range(len(shards))]
    height, width = shards.records["height"].astype(np.int64), shards.records["width"].astype(np.int64)
    order = np.lexsort((width, height))
    order = order[shards.records["image_bytes"][order] > 0].tolist()
    swapped = np.arange(len(shards), dtype=np.int64)
    for place, index in enumerate(order):
        neighbours = [order[(place + step) % len(order)] for step in range(1, min(len(order), 1 + _NEIGHBOURS))]
        others = [other for other in neighbours if captions[other] != captions[index]]
        same_size = [o for o in others if height[o] == height[index] and width[o] == width[index]]
        swapped[index] = next(iter(same_size or others), index)
    return swapped
