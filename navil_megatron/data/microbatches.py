"""Rows of the plan to a microbatch: read, encode, decode, assemble.

What cannot be read although the plan counts on it, because it does not decode or is not what was indexed, becomes a
blank image of the planned grid or as many tokens of padding, and its sample loses its loss: plan, packing and resume
stay exact. The encoder's ranks split the images, and later pipeline stages
need none.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from navil_megatron.blueprint.image_plan import ImagePlanner
from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.assemble import RowFormat, assemble
from navil_megatron.data.choose_decoder import build_image_decoder
from navil_megatron.data.encode import blank_sample, encode_sample
from navil_megatron.data.image_decode import DecodeJob, ImageDecodeError, ImageDecoder, blank_patches
from navil_megatron.data.plan import Row
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.shards.source import DamagedSampleError, Source
from navil_megatron.data.tokenizer import SampleTokenizer
from navil_megatron.data.types import DataPlace, EncodedSample, FailedSample, Microbatch, PackedSequence, SampleId


class _Picture(NamedTuple):
    """One image of a microbatch of which this rank decodes a scale."""

    position: int  # its sample's place in the microbatch
    shown: SampleId  # whose picture it is
    job: DecodeJob
    damage: ImageDecodeError | None  # what is wrong with the file even before it is decoded


class MicrobatchBuilder:
    """Makes microbatches from the samples of some sources."""

    def __init__(
        self,
        config: NaViLConfig,
        sources: Sequence[Source],
        tokenizer: SampleTokenizer,
        *,
        place: DataPlace,
        pictures_of: Callable[[SampleId], SampleId] | None = None,
    ) -> None:
        """``pictures_of`` gives for a sample another one whose pictures it shows, resized to its own grids."""
        self._sources, self._tokenizer = tuple(sources), tokenizer
        self._planner = ImagePlanner.from_config(config.data, config.model.vision)
        self._model, self._place, self._pictures_of = config.model, place, pictures_of
        self._image_text_loss = config.data.image_text_loss
        self._decoder: ImageDecoder | None = build_image_decoder(config) if place.is_first_stage else None
        self.row_format = RowFormat(
            seq_length=config.data.seq_length,
            pad_segments_to=config.pad_segments_to,
            pad_id=tokenizer.pad_id,
            special_token_ids=tokenizer.special_token_ids,
        )

    def build(self, rows: Sequence[Row]) -> Microbatch:
        """The microbatch of some rows; UserError where a shard cannot be read, or an index does not fit it."""
        sequences = self.encode(rows)
        microbatch = plan_microbatch(assemble(sequences, self.row_format), self._model, self._place)
        microbatch = replace(microbatch, num_shrunk=sum(int((row.dropped > 0).sum()) for row in rows))
        samples = [sample for row in sequences for sample in row.samples]
        failures = {
            position: self._failed(position, sample.sample, sample.damage)
            for position, sample in enumerate(samples)
            if sample.damage
        }
        if self._decoder is not None:
            pictures = list(self._pictures(samples, microbatch.vision_plan.is_mine))
            pixel_values, without_picture = self._decode(pictures, self._decoder)
            microbatch, failures = replace(microbatch, pixel_values=pixel_values), without_picture | failures
        return replace(microbatch, failures=tuple(failures.values()))

    def decode_all(self, samples: Sequence[EncodedSample]) -> torch.Tensor:
        """[p, 3 * patch * patch] of every scale of every image, blank where one fails; for a first stage."""
        assert self._decoder is not None, "this rank reads no pixels"
        every = np.ones(sum(len(scales) for sample in samples for scales in sample.scales), dtype=bool)
        return self._decode(list(self._pictures(samples, every)), self._decoder)[0]

    def encode(self, rows: Sequence[Row]) -> list[PackedSequence]:
        """Rows with their tokens and image plans; no picture is read."""
        samples = (tuple(map(self._encode, row.samples, row.dropped.tolist())) for row in rows)
        return [PackedSequence(encoded, self.row_format.seq_length) for encoded in samples]

    def _encode(self, sample: SampleId, dropped: int) -> EncodedSample:
        source = self._sources[sample.source]
        images = source.index.images_of(sample.number)
        sizes = list(zip(images["height"].tolist(), images["width"].tolist(), strict=True))
        scales = self._planner.plan_images(sizes, dropped)
        num_text_tokens = int(source.index.samples[sample.number]["text_tokens"])
        planned = self._planner.count_tokens(scales) + num_text_tokens
        try:
            content = source.read_content(sample.number)
        except DamagedSampleError:
            blank = sample, num_text_tokens, scales, self._tokenizer, self._planner.merge_size
            return blank_sample(*blank, damage="text differs from the index")
        merge_size, learned = self._planner.merge_size, self._image_text_loss
        encoded = encode_sample(sample, content, scales, self._tokenizer, merge_size, learned)
        if len(encoded.input_ids) != planned:
            raise UserError(
                f"{source.shard_of(sample.number)}: {source.key(sample.number)} has {len(encoded.input_ids)} tokens, "
                f"but its index says {planned}: index the shards anew with: navil-megatron data index"
            )
        return encoded

    def _pictures(self, samples: Sequence[EncodedSample], is_mine: np.ndarray) -> Iterator[_Picture]:
        wanted = iter(is_mine.tolist())
        for position, sample in enumerate(samples):
            shown = self._pictures_of(sample.sample) if self._pictures_of else sample.sample
            source = self._sources[shown.source]
            for number, scales in enumerate(sample.scales):
                chosen = tuple(islice(wanted, len(scales)))
                if any(chosen):
                    image = source.index.images_of(shown.number)[number]
                    size = int(image["height"]), int(image["width"])
                    file, damage = b"", None
                    try:
                        file = source.read_image(shown.number, number)
                    except DamagedSampleError:
                        damage = ImageDecodeError("image differs from the index")
                    job = DecodeJob(file=file, size=size, scales=scales, wanted=chosen)
                    yield _Picture(position, shown, job, damage)

    def _decode(
        self, pictures: Sequence[_Picture], decoder: ImageDecoder
    ) -> tuple[torch.Tensor, dict[int, FailedSample]]:
        """[p, 3 * patch * patch] of the wanted scales in order, blank where an image fails; and who failed."""
        patches = [torch.zeros(0, self._model.vision.patch_dim, dtype=torch.uint8)]
        failures: dict[int, FailedSample] = {}
        sound = iter(decoder.decode([picture.job for picture in pictures if picture.damage is None]))
        for picture in pictures:
            decoded = picture.damage or next(sound)
            if isinstance(decoded, ImageDecodeError):
                failures[picture.position] = self._failed(picture.position, picture.shown, str(decoded))
                scales, patch_size = picture.job.wanted_scales, self._model.vision.patch_size
                decoded = [blank_patches(scale, patch_size) for scale in scales]
            patches += decoded
        pixel_values = torch.cat(patches)
        return pixel_values.pin_memory() if self._place.pins_pixels else pixel_values, failures

    def _failed(self, position: int, sample: SampleId, reason: str) -> FailedSample:
        source = self._sources[sample.source]
        try:
            key = source.key(sample.number)
        except DamagedSampleError:
            key = f"sample {sample.number}"  # its name is damaged, too
        return FailedSample(position, source.shard_of(sample.number), key, reason)
