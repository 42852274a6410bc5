"""Hashes: SHA-256 names what something was made from, XXH3 tells whether bytes are the same."""

import hashlib
from collections.abc import Buffer, Iterable
from pathlib import Path

import xxhash

_BLOCK_BYTES = 2**24


def fingerprint(text: str) -> str:
    """32 hexadecimal digits that name a text; paths with undecodable bytes are texts, too."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def digest(content: Buffer) -> str:
    """Hash of bytes: 128 bits of XXH3, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def check(content: Buffer) -> int:
    """Hash of bytes as a number of 64 bits, to be kept in a table."""
    return xxhash.xxh3_64_intdigest(content)


def short_check(content: Buffer) -> int:
    """The same in 32 bits."""
    return check(content) & 0xFFFF_FFFF


def digest_of_files(paths: Iterable[Path], folder: Path | None = None) -> str:
    """Hash of files' bytes, and of their names relative to ``folder`` where one is given."""
    state = xxhash.xxh3_128()
    for path in paths:
        if folder is not None:
            state.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                state.update(block)
        state.update(f"\n{path.stat().st_size}\n".encode())
    return state.hexdigest()
