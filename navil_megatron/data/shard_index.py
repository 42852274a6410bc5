"""The index beside a shard: ``x.tar`` -> ``x.tar.index``, a 64-byte header and one 40-byte record per sample.

It holds what planning needs without the tar: where the bytes lie, the picture's size with EXIF applied, the caption's
length. Caption tokens are stored for the one tokenizer that the header names; for any other they are counted anew.
"""

import os
from pathlib import Path

import numpy as np

from navil_megatron.config.errors import UserError

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("record_bytes", "<u4"),
        ("num_samples", "<u8"),
        ("shard_bytes", "<u8"),
        ("content", "V16"),  # digest of the samples' keys and bytes
        ("tokenizer", "V16"),  # fingerprint behind caption_tokens; zeros: not counted
    ]
)
RECORD = np.dtype(
    [
        ("image_offset", "<u8"),
        ("text_offset", "<u8"),
        ("image_bytes", "<u4"),  # 0: a sample of text alone
        ("text_bytes", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("caption_tokens", "<u4"),
        ("name_bytes", "<u2"),  # tar header in front of the image, or of the text where there is no image
        ("text_is_json", "u1"),
        ("spare", "u1"),
    ]
)
MAGIC = b"NAVILIDX"
VERSION = 1
NOT_COUNTED = bytes(16)
"""In place of a tokenizer's fingerprint: the index holds no caption tokens."""


def index_path(shard: str | Path) -> Path:
    """Where the index of a shard lies."""
    return Path(f"{shard}.index")


def save_index(shard: str | Path, records: np.ndarray, content: bytes, tokenizer_fingerprint: bytes) -> None:
    """Writes the index of a finished shard; a reader sees the old one or the new one, never a piece.

    Args:
        shard: the tar.
        records: [n] of ``RECORD``.
        content: 16-byte digest of the samples.
        tokenizer_fingerprint: 16 bytes that name the tokenizer behind ``caption_tokens``, or ``NOT_COUNTED``.
    """
    header = np.zeros((), dtype=HEADER)
    header["magic"], header["version"], header["record_bytes"] = MAGIC, VERSION, RECORD.itemsize
    header["num_samples"], header["shard_bytes"] = len(records), os.stat(shard).st_size
    header["content"], header["tokenizer"] = np.void(content), np.void(tokenizer_fingerprint)
    partial = Path(f"{index_path(shard)}.partial")
    partial.write_bytes(header.tobytes() + records.tobytes())
    os.replace(partial, index_path(shard))


def load_index(shard: str | Path) -> tuple[np.void, np.ndarray]:
    """(header, records) of a shard; the records are mapped into memory, not read.

    Raises:
        UserError: shard or index are missing, damaged, or do not belong together.
    """
    rebuild = f"index it anew with: navil-megatron data index {shard}"
    try:
        shard_bytes = os.stat(shard).st_size
    except OSError:
        raise UserError(f"shard {shard} is missing: restore it or take it out of the shard list") from None
    path = index_path(shard)
    if not path.is_file():
        raise UserError(f"shard {shard} has no index {path.name} beside it: {rebuild}")
    index_bytes = path.stat().st_size
    if index_bytes < HEADER.itemsize:
        raise UserError(f"index {path} is damaged ({index_bytes} bytes): {rebuild}")
    header = np.fromfile(path, dtype=HEADER, count=1)[0]
    if header["magic"] != MAGIC or header["version"] != VERSION or header["record_bytes"] != RECORD.itemsize:
        raise UserError(f"index {path} is damaged or of another version (expected version {VERSION}): {rebuild}")
    expected = HEADER.itemsize + int(header["num_samples"]) * RECORD.itemsize
    if index_bytes != expected:
        raise UserError(f"index {path} is damaged ({index_bytes} bytes, expected {expected}): {rebuild}")
    if header["shard_bytes"] != shard_bytes:
        raise UserError(
            f"shard {shard} is damaged or was replaced: it has {shard_bytes} bytes, but had "
            f"{int(header['shard_bytes'])} when it was indexed; restore it or {rebuild}"
        )
    if header["num_samples"] == 0:
        return header, np.zeros(0, dtype=RECORD)  # an empty file region cannot be mapped
    return header, np.memmap(path, dtype=RECORD, mode="r", offset=HEADER.itemsize)
