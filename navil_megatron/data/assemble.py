"""Encoded samples to the arrays of some rows.

A row is its samples in causal order, then one block of visual padding, then text padding: every row ends on the FP8
multiple in both modalities, with pad tokens and never by stretching a sample. Padding has segments of its own.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from navil_megatron.blueprint.image_plan import image_grid_thw, visual_tokens
from navil_megatron.data.types import IGNORED_LABEL, EncodedSample, Microbatch, PackedRows, PackedSequence

MAX_PADDING_SEGMENT = 256
"""Longest attention segment of padding, in tokens: attention over padding is wasted, and its cost is quadratic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat:
    """What the arrays of a row depend on besides its samples."""

    seq_length: int
    pad_segments_to: int  # each modality's segment is padded to a multiple of this many tokens
    pad_id: int
    special_token_ids: tuple[int, ...]  # ids of the 12 special tokens, in the order of ``SPECIAL_TOKENS``


@dataclass(frozen=True, slots=True)
class _Piece:
    """One attention segment's share of every array, all [n]."""

    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray
    visual: np.ndarray
    is_sample: bool = False  # not padding


def assemble(rows: Sequence[PackedSequence], row_format: RowFormat) -> PackedRows:
    """Some rows, laid end to end; ValueError where the samples of one do not fit it."""
    pieces = [piece for row in rows for piece in _row_pieces(row, row_format)]
    lengths = tuple(len(piece.input_ids) for piece in pieces)
    samples = [sample for row in rows for sample in row.samples]
    starts = np.cumsum([0, *lengths])[:-1]
    return PackedRows(
        input_ids=np.concatenate([piece.input_ids for piece in pieces]),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        labels=np.concatenate([piece.labels for piece in pieces]),
        loss_weights=np.concatenate([piece.loss_weights for piece in pieces]),
        visual_token_mask=np.concatenate([piece.visual for piece in pieces]),
        segment_lengths=lengths,
        image_grid_thw=image_grid_thw([scales for sample in samples for scales in sample.scales]),
        samples=tuple(sample.sample for sample in samples),
        sample_starts=tuple(int(start) for start, piece in zip(starts, pieces, strict=True) if piece.is_sample),
        sample_lengths=tuple(len(sample.input_ids) for sample in samples),
    )


def drop_loss(microbatch: Microbatch, failed: Collection[int]) -> Microbatch:
    """The microbatch with no loss on these samples, given by their place in it."""
    if not failed:
        return microbatch
    labels, loss_weights = microbatch.labels.copy(), microbatch.loss_weights.copy()
    for position in failed:
        start = microbatch.sample_starts[position]
        tokens = slice(start, start + microbatch.sample_lengths[position])
        labels[tokens], loss_weights[tokens] = IGNORED_LABEL, 0.0
    return replace(microbatch, labels=labels, loss_weights=loss_weights)


def _row_pieces(row: PackedSequence, row_format: RowFormat) -> list[_Piece]:
    pieces = [_sample_piece(sample, row_format) for sample in row.samples]
    num_visual = sum(int(piece.visual.sum()) for piece in pieces)
    visual_padding = -num_visual % row_format.pad_segments_to
    text_padding = row.seq_length - sum(len(piece.input_ids) for piece in pieces) - visual_padding
    if text_padding < 0:
        raise ValueError(f"a row of {row.seq_length} tokens is over-full by {-text_padding}")
    for length, visual in ((visual_padding, True), (text_padding, False)):
        for start in range(0, length, MAX_PADDING_SEGMENT):
            pieces.append(_padding_piece(min(MAX_PADDING_SEGMENT, length - start), row_format.pad_id, visual))
    return pieces


def _sample_piece(sample: EncodedSample, row_format: RowFormat) -> _Piece:
    """One sample: labels are the tokens that follow, weighted as the sample says."""
    loss_weights = np.zeros(len(sample.input_ids), dtype=np.float32)
    loss_weights[:-1] = sample.loss_weights[1:]
    following = np.roll(sample.input_ids, -1)
    return _Piece(
        input_ids=sample.input_ids,
        labels=np.where(loss_weights > 0, following, IGNORED_LABEL),
        loss_weights=loss_weights,
        visual=visual_tokens(sample.input_ids, row_format.special_token_ids),
        is_sample=True,
    )


def _padding_piece(length: int, pad_id: int, visual: bool) -> _Piece:
    return _Piece(
        input_ids=np.full(length, pad_id, dtype=np.int64),
        labels=np.full(length, IGNORED_LABEL, dtype=np.int64),
        loss_weights=np.zeros(length, dtype=np.float32),
        visual=np.full(length, visual),
    )
