"""Rows of the plan to a microbatch: read, encode, decode, assemble.

An image that does not decode although the plan counts on it becomes a blank image of the planned grid, and its sample
loses its loss: plan, packing and resume stay exact. Which images a rank decodes is decided outside: the encoder's ranks
split them, and later pipeline stages need none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from navil_megatron.blueprint.image_plan import ImagePlanner, ScalePlan, visual_tokens
from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.assemble import RowFormat, assemble
from navil_megatron.data.encode import encode_sample
from navil_megatron.data.image_decode import (
    DecodeJob,
    ImageDecodeError,
    ImageDecoder,
    blank_patches,
    build_image_decoder,
    normalise,
)
from navil_megatron.data.plan import Row
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer
from navil_megatron.data.types import EncodedSample, FailedSample, Microbatch, PackedSequence, SampleId

type Decodes = Callable[[np.ndarray], np.ndarray]
"""[num_scales, 3] grids of a microbatch -> [num_scales] bool: the scale images whose pixels this rank needs."""


@dataclass(slots=True)
class DataCounts:
    """What went through a loader since it was opened; sums, so two of them add up."""

    samples: int = 0
    """Samples handed out."""
    shrunk: int = 0
    """Of these, without their images' largest scales, so as to fit a row."""
    text_tokens: int = 0
    """Tokens for the text experts, padding not included."""
    visual_tokens: int = 0
    """Tokens for the visual experts, padding not included."""
    padding_tokens: int = 0
    """Tokens of padding."""

    @property
    def padding_share(self) -> float:
        """Share of all tokens that are padding."""
        return self.padding_tokens / max(1, self.text_tokens + self.visual_tokens + self.padding_tokens)

    def add(self, other: "DataCounts") -> None:
        """Adds another's counts."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True, slots=True)
class _Picture:
    """One image of a microbatch."""

    position: int
    """Its sample's place in the microbatch."""
    sample: SampleId
    """Whose picture is shown."""
    number: int
    """Which image of that sample."""
    scales: tuple[ScalePlan, ...]
    wanted: tuple[bool, ...]


class MicrobatchBuilder:
    """Makes microbatches from the samples of some sources."""

    def __init__(
        self,
        config: NaViLConfig,
        sources: Sequence[Source],
        tokenizer: SampleTokenizer,
        *,
        decodes: Decodes | None,
        pictures_of: Callable[[SampleId], SampleId] = lambda sample: sample,
    ) -> None:
        """Prepares for some sources.

        Args:
            config: the run.
            sources: where samples are read.
            tokenizer: makes tokens of them.
            decodes: which scale images this rank decodes; None: it needs no pixels.
            pictures_of: for a sample the one whose pictures it shows, resized to its own grids.
        """
        self._sources, self._tokenizer = tuple(sources), tokenizer
        self._planner = ImagePlanner.from_config(config.data, config.model.vision)
        self._decodes, self._pictures_of = decodes, pictures_of
        self._patch_size, self._patch_dim = config.model.vision.patch_size, config.model.vision.patch_dim
        self._decoder: ImageDecoder | None = None if decodes is None else build_image_decoder(config)
        self.row_format = RowFormat(
            seq_length=config.data.seq_length,
            pad_segments_to=config.pad_segments_to,
            pad_id=tokenizer.pad_id,
            special_token_ids=tokenizer.special_token_ids,
        )

    def build(self, rows: Sequence[Row]) -> tuple[Microbatch, DataCounts, list[FailedSample]]:
        """The microbatch of some rows, its counts, and the samples whose images failed on this rank.

        Raises:
            UserError: a shard cannot be read, or an index does not fit it.
        """
        sequences = self.encode(rows)
        grids = [scale for row in sequences for sample in row.samples for image in sample.scales for scale in image]
        has_pixels = np.zeros(len(grids), dtype=bool)
        pixel_values: torch.Tensor | None = None
        failures: list[FailedSample] = []
        if self._decodes is not None and self._decoder is not None:
            has_pixels = self._decodes(
                np.array([(1, g.grid_height, g.grid_width) for g in grids], dtype=np.int64).reshape(-1, 3)
            )
            pixel_values, failures = self._decode(self._pictures(sequences, has_pixels), self._decoder)
        microbatch = assemble(sequences, self.row_format, pixel_values, has_pixels)
        return microbatch, self._count(rows, sequences), failures

    def encode(self, rows: Sequence[Row]) -> list[PackedSequence]:
        """Rows with their tokens and image plans; no picture is read."""
        return [
            PackedSequence(
                tuple(
                    self._encode(sample, int(dropped)) for sample, dropped in zip(row.samples, row.dropped, strict=True)
                ),
                self.row_format.seq_length,
            )
            for row in rows
        ]

    def _encode(self, sample: SampleId, dropped: int) -> EncodedSample:
        source = self._sources[sample.source]
        images = source.index.images_of(sample.number)
        sizes = list(zip(images["height"].tolist(), images["width"].tolist(), strict=True))
        scales = self._planner.plan_images(sizes, dropped)
        content = source.read(sample.number, images=False).content
        encoded = encode_sample(sample, content, scales, self._tokenizer, self._planner.merge_size)
        planned = self._planner.count_tokens(scales) + int(source.index.samples[sample.number]["text_tokens"])
        if len(encoded.input_ids) != planned:
            where = f"{source.shard_of(sample.number)}: {source.key(sample.number)}"
            raise UserError(
                f"{where} has {len(encoded.input_ids)} tokens, but "
                f"its index says {planned}: index the shards anew with: navil-megatron data index"
            )
        return encoded

    def _pictures(self, sequences: Sequence[PackedSequence], has_pixels: np.ndarray) -> list[_Picture]:
        """The images of which this rank decodes a scale."""
        pictures, first = [], 0
        samples = [sample for row in sequences for sample in row.samples]
        for position, sample in enumerate(samples):
            shown = self._pictures_of(sample.sample)
            for number, scales in enumerate(sample.scales):
                wanted = tuple(has_pixels[first : first + len(scales)].tolist())
                first += len(scales)
                if any(wanted):
                    pictures.append(_Picture(position, shown, number, scales, wanted))
        return pictures

    def _decode(self, pictures: Sequence[_Picture], decoder: ImageDecoder) -> tuple[torch.Tensor, list[FailedSample]]:
        """[p, 3 * patch * patch] of the wanted scales in order, blank where an image fails; and who failed."""
        jobs = [self._job(picture) for picture in pictures]
        patches: list[torch.Tensor] = []
        failures: dict[int, FailedSample] = {}
        for picture, job, decoded in zip(pictures, jobs, decoder.decode(jobs), strict=True):
            if isinstance(decoded, ImageDecodeError):
                source = self._sources[picture.sample.source]
                shard, key = source.shard_of(picture.sample.number), source.key(picture.sample.number)
                failures[picture.position] = FailedSample(picture.position, shard, key, str(decoded))
                decoded = [blank_patches(scale, self._patch_size, decoder.device) for scale in job.wanted_scales]
            patches += decoded
        if not patches:
            return torch.zeros(0, self._patch_dim, device=decoder.device), []
        return normalise(torch.cat(patches)), list(failures.values())

    def _job(self, picture: _Picture) -> DecodeJob:
        source = self._sources[picture.sample.source]
        image = source.index.images_of(picture.sample.number)[picture.number]
        size = int(image["height"]), int(image["width"])
        file = source.read_image(picture.sample.number, picture.number)
        return DecodeJob(file=file, size=size, scales=picture.scales, wanted=picture.wanted)

    def _count(self, rows: Sequence[Row], sequences: Sequence[PackedSequence]) -> DataCounts:
        samples = [sample for sequence in sequences for sample in sequence.samples]
        tokens = sum(len(sample.input_ids) for sample in samples)
        visual = sum(int(visual_tokens(s.input_ids, self.row_format.special_token_ids).sum()) for s in samples)
        return DataCounts(
            samples=len(samples),
            shrunk=sum(int((row.dropped > 0).sum()) for row in rows),
            text_tokens=tokens - visual,
            visual_tokens=visual,
            padding_tokens=len(sequences) * self.row_format.seq_length - tokens,
        )
