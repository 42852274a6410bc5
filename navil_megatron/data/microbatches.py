"""Sample indices of some rows to a microbatch: read, encode, decode, assemble.

A picture that does not decode although the plan counts on it becomes a blank image of the planned grid, and its sample
loses its loss: plan, packing and resume stay exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import NaViLConfig
from navil_megatron.data.assemble import RowFormat, assemble
from navil_megatron.data.encode import SampleEncoder, SampleTooLongError
from navil_megatron.data.image_decode import ImageDecodeError, blank_patches, decode_image, decode_patches, normalise
from navil_megatron.data.image_plan import visual_tokens
from navil_megatron.data.shards import ShardSet
from navil_megatron.data.types import EncodedSample, Microbatch, PackedSequence


@dataclass(frozen=True, slots=True)
class FailedSample:
    """A sample whose picture did not decode."""

    shard: str
    key: str
    reason: str


@dataclass(slots=True)
class DataCounts:
    """What went through a loader since it was opened; sums, so two of them add up."""

    samples: int = 0
    """Samples handed out."""
    failed: int = 0
    """Of these, blank because their picture did not decode."""
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
        self.samples += other.samples
        self.failed += other.failed
        self.text_tokens += other.text_tokens
        self.visual_tokens += other.visual_tokens
        self.padding_tokens += other.padding_tokens


class MicrobatchBuilder:
    """Makes microbatches from the samples of one source."""

    def __init__(
        self,
        config: NaViLConfig,
        shards: ShardSet,
        encoder: SampleEncoder,
        *,
        decode_pixels: bool,
        pictures_of: np.ndarray | None = None,
    ) -> None:
        """Prepares for a source.

        Args:
            config: the run.
            shards: the samples.
            encoder: makes tokens of them.
            decode_pixels: give ``pixel_values``. Where it is off, pictures are still decoded, to the same verdict:
                the stage that computes the loss must mask the samples that are blank in the stage of the encoder.
            pictures_of: [n] for each sample the one whose picture it shows instead of its own, resized to its grid.
        """
        self._shards, self._encoder = shards, encoder
        self._decode_pixels, self._pictures_of = decode_pixels, pictures_of
        self._patch_size, self._merge_size = config.model.vision.patch_size, config.model.vision.merge_size
        self._patch_dim = config.model.vision.patch_dim
        self.row_format = RowFormat(
            seq_length=config.data.seq_length,
            pad_segments_to=config.data.pad_segments_to,
            pad_id=encoder.tokenizer.pad_id,
            special_token_ids=encoder.tokenizer.special_token_ids,
        )

    def build(self, rows: Sequence[np.ndarray]) -> tuple[Microbatch, DataCounts, list[FailedSample]]:
        """The microbatch of rows of sample indices, its counts, and the samples that failed in it."""
        sequences = [
            PackedSequence(tuple(self._encode(int(index)) for index in row), self.row_format.seq_length) for row in rows
        ]
        pixels, failures = [np.zeros((0, self._patch_dim), dtype=np.uint8)], {}
        for sequence in sequences:
            for sample in sequence.samples:
                patches, failure = self._decode(sample)
                pixels += patches
                if failure is not None:
                    failures[sample.sample_index] = failure
        pixel_values = normalise(np.concatenate(pixels)) if self._decode_pixels else None
        microbatch = assemble(sequences, self.row_format, pixel_values, frozenset(failures))
        return microbatch, self._count(sequences, failures), list(failures.values())

    def _encode(self, index: int) -> EncodedSample:
        try:
            return self._encoder.encode(self._shards, index)
        except SampleTooLongError as error:  # the plan took it from the index to be shorter
            raise UserError(f"an index does not fit its shard or tokenizer, index it anew: {error}") from None

    def _decode(self, sample: EncodedSample) -> tuple[list[np.ndarray], FailedSample | None]:
        """Patches of a sample's images; blank ones and the reason where an image does not decode."""
        if not sample.scales:
            return [], None
        index = sample.sample_index if self._pictures_of is None else int(self._pictures_of[sample.sample_index])
        raw = self._shards.read(index)
        try:
            if not self._decode_pixels:
                for file in raw.images:
                    decode_image(file)
                return [], None
            return [
                decode_patches(file, scales, self._patch_size, self._merge_size)
                for file, scales in zip(raw.images, sample.scales, strict=True)
            ], None
        except ImageDecodeError as error:
            blank = [blank_patches(scales, self._patch_size) for scales in sample.scales]
            return blank, FailedSample(shard=raw.shard, key=raw.key, reason=str(error))

    def _count(self, sequences: Sequence[PackedSequence], failures: dict[int, FailedSample]) -> DataCounts:
        samples = [sample for sequence in sequences for sample in sequence.samples]
        tokens = sum(len(sample.input_ids) for sample in samples)
        visual = sum(int(visual_tokens(s.input_ids, self.row_format.special_token_ids).sum()) for s in samples)
        return DataCounts(
            samples=len(samples),
            failed=sum(sample.sample_index in failures for sample in samples),
            text_tokens=tokens - visual,
            visual_tokens=visual,
            padding_tokens=len(sequences) * self.row_format.seq_length - tokens,
        )
