"""From what people have to indexed shards: a folder of images with JSON lines, or tars that exist already.

Behind ``navil-megatron data build`` and ``data index``. Bad samples are left out and counted by reason.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.data.image_decode import ImageDecodeError, open_image
from navil_megatron.data.index_build import IndexReport, RejectedSample, TokenCounter, check_image, index_shard
from navil_megatron.data.shards import ShardWriter, expand_shards
from navil_megatron.data.tokenizer import load_tokenizer

type OnProgress = Callable[[int, int], None]
"""Called with (done, total) after every item; whoever has a terminal draws a bar with it."""

MAX_NAMED_REJECTIONS = 100
"""Rejected samples that a report names; it counts all."""


def build_shards(
    manifest: Path,
    output: Path,
    *,
    prefix: str = "shard",
    samples_per_shard: int = 10_000,
    tokenizer: Path | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Writes indexed tar shards from JSON lines of ``{"image": path, "caption": text}``.

    Images are stored as the files they are. A line without ``image`` is a sample of text alone.

    Args:
        manifest: the JSON lines; image paths are relative to its folder.
        output: folder of the shards, made if needed.
        prefix: shards are called ``<prefix>-000000.tar`` and so on.
        samples_per_shard: samples of a full shard.
        tokenizer: Hugging Face folder; stores caption lengths in the indexes, so that a run need not count them.
        on_progress: called with (done, total) after every line.

    Returns:
        A report: counts, sizes, shards, and rejected samples with reasons.

    Raises:
        UserError: the manifest cannot be read, the output holds such shards already, or no sample is any good.
    """
    if any(output.glob(f"{prefix}-*.tar")):
        raise UserError(f"{output} already holds {prefix}-*.tar: remove them, or choose another folder or prefix")
    report = IndexReport()
    tokens = _token_counter(tokenizer)
    lines = _read_lines(manifest)
    with ShardWriter(output, prefix, samples_per_shard=samples_per_shard, decode=False, tokens=tokens) as writer:
        for number, line in enumerate(lines):
            try:
                caption, image, extension = _read_pair(line, manifest.parent)
                writer.write(f"{number:09d}", caption, image, extension)
            except RejectedSample as rejection:
                report.reject(f"{manifest}:{number + 1}", str(rejection))
            if on_progress is not None:
                on_progress(number + 1, len(lines))
    report.num_samples = writer.report.num_samples
    for where, reason in writer.report.rejected:
        report.reject(where, reason)
    return _summary(report, [str(shard) for shard in writer.shards])


def index_shards(
    patterns: Sequence[str],
    *,
    tokenizer: Path | None = None,
    decode: bool = True,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Builds the index of existing WebDataset tars, e.g. img2dataset's, beside each of them.

    Args:
        patterns: glob patterns or paths of tars.
        tokenizer: as in ``build_shards``.
        decode: decode every picture in full; off, only headers are read (faster; damage then shows up in training).
        on_progress: called with (done, total) after every shard.

    Returns:
        A report as of ``build_shards``.

    Raises:
        UserError: a tar is missing or damaged, or no sample is any good.
    """
    shards = expand_shards(patterns, "shards")
    report, tokens = IndexReport(), _token_counter(tokenizer)
    for number, shard in enumerate(shards):
        index_shard(Path(shard), report, decode=decode, tokens=tokens)
        if on_progress is not None:
            on_progress(number + 1, len(shards))
    return _summary(report, shards)


def _token_counter(tokenizer: Path | None) -> TokenCounter | None:
    return load_tokenizer(tokenizer).counter if tokenizer is not None else None


def _read_lines(manifest: Path) -> list[bytes]:
    """The lines of the manifest that are not blank."""
    try:
        return [line for line in manifest.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"manifest {manifest} cannot be read ({error.strerror}): give a file with one JSON object a line"
        ) from None


def _read_pair(line: bytes, folder: Path) -> tuple[str, bytes | None, str]:
    """(caption, image bytes or None, extension) of one line."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise RejectedSample("line is not JSON") from None
    caption = fields.get("caption") if isinstance(fields, dict) else None
    if not isinstance(caption, str):
        raise RejectedSample("line without a caption")
    if not caption.strip():
        raise RejectedSample("empty caption")
    name = fields.get("image")
    if name is None:
        return caption, None, ""
    try:
        image = (folder / name).read_bytes()
    except (OSError, TypeError, ValueError):
        raise RejectedSample("image file cannot be read") from None
    check_image(image, decode=True)
    return caption, image, image_extension(image)


def image_extension(file: bytes) -> str:
    """The file name extension that fits the content, whatever the file was called.

    Raises:
        RejectedSample: no image.
    """
    try:
        kind = (open_image(file).format or "").lower()
    except ImageDecodeError as error:
        raise RejectedSample(f"image: {error}") from None
    return {"jpeg": "jpg", "mpo": "jpg"}.get(kind, kind)


def _summary(report: IndexReport, shards: list[str]) -> dict[str, Any]:
    """The report as plain data."""
    if report.num_samples == 0:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in report.reasons.most_common())
        raise UserError(f"no sample is any good ({reasons or 'there are none'}): check paths and format")
    return {
        "num_samples": report.num_samples,
        "num_rejected": report.reasons.total(),
        "rejected_reasons": dict(report.reasons.most_common()),
        "rejected": [{"where": where, "reason": reason} for where, reason in report.rejected[:MAX_NAMED_REJECTIONS]],
        "shards": shards,
        "bytes": sum(Path(shard).stat().st_size for shard in shards),
    }
