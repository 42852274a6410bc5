"""What an index holds, in numbers for a program and in lines for a person."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from navil_megatron.config.errors import printable
from navil_megatron.data.shards.shard_index import IMAGE, KIND_CONVERSATION, SourceIndex, Table

_ENTRIES_AT_ONCE = 2**20
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)


def report_index(
    path: Path,
    reasons: Counter[str] | None = None,
    rejected: Path | None = None,
    firsts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Counts and histograms of an index, after a build what was left out; UserError where it cannot be read.

    ``firsts``: of each reason the first key or line.
    """
    index = SourceIndex(path)
    report = {
        "index": str(path),
        "num_shards": len(index.shards),
        "shard_bytes": sum(shard.num_bytes for shard in index.shards),
        "index_bytes": path.stat().st_size,
        **_measure_samples(index),
        **_measure_images(index.images),
        "tokenizer": index.tokenizer,
        "fingerprint": index.fingerprint,
        "shards": [shard.path for shard in index.shards],
    }
    if reasons is not None:
        report |= {"num_rejected": reasons.total(), "rejected_reasons": dict(reasons.most_common())}
        report |= {"rejected_first": dict(firsts or {}), "rejected": str(rejected)}
    return report


def _measure_samples(index: SourceIndex) -> dict[str, Any]:
    """Counts by kind, and tokens of text; a stretch at a time, so that memory stays small."""
    powers = np.zeros(33, dtype=np.int64)
    tokens = conversations = interleaved = without_images = most_images = 0
    for start in range(0, len(index.samples), _ENTRIES_AT_ONCE):
        some = index.samples[start : start + _ENTRIES_AT_ONCE]
        powers += np.bincount(np.frexp(some["text_tokens"].astype(np.float64))[1], minlength=33)
        tokens += int(some["text_tokens"].sum(dtype=np.int64))
        conversations += int((some["kind"] == KIND_CONVERSATION).sum())
        interleaved += int((some["kind"] > KIND_CONVERSATION).sum())
        without_images += int((some["num_images"] == 0).sum())
        most_images = max(most_images, int(some["num_images"].max()))
    return {
        "num_samples": len(index.samples),
        "num_conversations": conversations,
        "num_interleaved": interleaved,
        "num_without_images": without_images,
        "most_images_of_a_sample": most_images,
        "text_tokens": tokens,
        # "64" counts the samples of 64 to 127 tokens
        "text_token_histogram": {str(2**power >> 1): int(count) for power, count in enumerate(powers) if count},
    }


def _measure_images(images: Table) -> dict[str, Any]:
    """Their number and bytes, and quantiles over a million of them, evenly spaced."""
    some = np.asarray(images[:: max(1, len(images) // _ENTRIES_AT_ONCE)], dtype=IMAGE)
    values = {side: some[side] for side in ("height", "width")}
    values |= {"pixels": some["height"].astype(np.int64) * some["width"], "bytes": some["bytes"]}
    quantiles = {
        name: {str(q): int(np.quantile(value, q, method="nearest")) for q in _QUANTILES} if len(some) else {}
        for name, value in values.items()
    }
    return {
        "num_images": len(images),
        "image_bytes": int(images["bytes"].sum(dtype=np.int64)),
        "image_quantiles": quantiles,
    }


def describe_index_report(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [
        f"{report['index']}: {report['num_samples']} samples in {report['num_shards']} shards, "
        f"{report['shard_bytes']} bytes; index {report['index_bytes']} bytes",
        f"{report['num_conversations']} conversations, {report['num_without_images']} samples without images, "
        f"{report['num_images']} images of {report['image_bytes']} bytes, {report['num_interleaved']} documents with "
        "images in their text",
        f"{report['text_tokens']} text tokens, tokenizer {report['tokenizer']}",
    ]
    longest = max(report["text_token_histogram"].values(), default=1)
    for start, count in report["text_token_histogram"].items():
        lines.append(f"  from {start:>6} tokens: {count:>10} {'#' * -(-40 * count // longest)}")
    if report["num_images"]:
        for name, values in report["image_quantiles"].items():
            lines.append(f"  image {name}: " + ", ".join(f"{float(q):.0%} {value}" for q, value in values.items()))
    if "num_rejected" in report:
        for reason, count in report["rejected_reasons"].items():
            lines.append(f"left out {count}: {reason} (the first: {printable(report['rejected_first'][reason])})")
        if report["num_rejected"]:
            lines.append(f"all that was left out: {report['rejected']}")
    return "\n".join(lines)
