"""Held-out data: fixed rows, the same at every evaluation and for any number of ranks.

With ``swap_images`` each sample shows another sample's pictures: a model that reads its images must do worse on it.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import batched

import numpy as np

from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loader import load_run_tokenizer, open_sources
from navil_megatron.data.measure import Ruler
from navil_megatron.data.microbatches import MicrobatchBuilder
from navil_megatron.data.plan import Row, plan_rows
from navil_megatron.data.prefetch import Prefetch
from navil_megatron.data.shards.source import DamagedSampleError, Source
from navil_megatron.data.types import Content, DataPlace, Microbatch, SampleId

_NEIGHBOURS = 64  # samples of the next larger pictures among which a swap is looked for


class ValidationLoader:
    """Iterates over this rank's microbatches of one held-out source; every iteration starts from the front."""

    def __init__(self, config: NaViLConfig, index: str, place: DataPlace, *, swap_images: bool = False) -> None:
        """Opens an index; UserError where index, shards or tokenizer are missing, damaged or do not fit."""
        tokenizer = load_run_tokenizer(config)
        (source,) = sources = open_sources([index], tokenizer, config.data.remote)
        source.check_shards()
        every = np.arange(len(source.index))
        rows, refused = plan_rows(Ruler(config), [source.index], np.zeros_like(every), every)
        if not rows:
            raise UserError(f"no sample of {index} fits a row of {config.data.seq_length} tokens, or it holds none")
        self.num_samples = len(every) - len(refused)  # held-out samples, over all ranks
        self.num_refused = len(refused)  # samples that fit no row
        # every rank must run the same number of forward passes: empty rows, all padding and no loss, even them out
        at_once = config.training.micro_batch_size
        empty = Row(every[:0], every[:0], every[:0], 0)
        rows += [empty] * (-len(rows) % (place.dp_size * at_once))
        per_rank = len(rows) // place.dp_size
        self._groups = list(batched(rows[place.dp_rank * per_rank : (place.dp_rank + 1) * per_rank], at_once))
        pictures_of = swapped_pictures(source) if swap_images else None
        self._builder = MicrobatchBuilder(config, sources, tokenizer, place=place, pictures_of=pictures_of)
        self._data = config.data

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Microbatch]:
        threads = {"num_threads": self._data.num_workers, "num_ahead": self._data.prefetch_steps}
        with closing(Prefetch(lambda n: self._builder.build(self._groups[n]), 0, len(self._groups), **threads)) as made:
            yield from made


def swapped_pictures(source: Source) -> Callable[[SampleId], SampleId]:
    """For each sample another with as many pictures and other words, with first pictures of the same size if it can."""
    samples, images = source.index.samples, source.index.images
    contents = [_content(source, index) for index in range(len(samples))]
    with_images = np.flatnonzero(samples["num_images"])
    first = images[samples["first_image"][with_images]]
    order = with_images[np.lexsort((first["width"], first["height"], samples["num_images"][with_images]))].tolist()

    def looks(index: int) -> tuple[int, int, int]:
        picture = images[samples["first_image"][index]]
        return int(samples["num_images"][index]), int(picture["height"]), int(picture["width"])

    swapped = {}
    for place, index in enumerate(order):
        neighbours = [order[(place + ahead) % len(order)] for ahead in range(1, min(len(order), 1 + _NEIGHBOURS))]
        others = [o for o in neighbours if contents[o] != contents[index] and looks(o)[0] == looks(index)[0]]
        alike = [other for other in others if looks(other) == looks(index)]
        swapped[index] = next(iter(alike or others), index)
    return lambda sample: SampleId(sample.source, swapped.get(sample.number, sample.number))


def _content(source: Source, index: int) -> Content | None:
    try:
        return source.read_content(index)
    except DamagedSampleError:
        return None  # it will have no loss
