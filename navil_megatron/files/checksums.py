"""Hashes of tensors, kept in ``checksums.json`` beside what the converter writes and checked by whoever reads it."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash

from navil_megatron.config.errors import UserError

CHECKSUMS_FILE = "checksums.json"
_ALGORITHM = "xxh3_128"


def digest(tensor: torch.Tensor) -> str:
    """Hash of a tensor's bytes in row-major order: 128 bits of XXH3, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(raw_bytes(tensor)))


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def write_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Leaves the hashes, under the names of their slots, in the folder."""
    content = {"algorithm": _ALGORITHM, "tensors": dict(sorted(digests.items()))}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(content, indent=1) + "\n")


def read_checksums(folder: Path) -> dict[str, str] | None:
    """The hashes that lie in the folder; ``None`` if there are none.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        digests = content["tensors"]
        sound = content["algorithm"] == _ALGORITHM and all(isinstance(value, str) for value in digests.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged: expected {_ALGORITHM} hashes as JSON; copy it again, or delete it")
    return dict(digests)


def require_digest(tensor: torch.Tensor, name: str, expected: Mapping[str, str], place: Path) -> None:
    """Compares a tensor that was read with the hash that was left of it.

    Raises:
        UserError: They differ.
    """
    if name not in expected:
        raise UserError(f"{place.parent / CHECKSUMS_FILE} has no hash of {name}; delete it if the weights were changed")
    if digest(tensor) != expected[name]:
        raise UserError(
            f"{name} in {place} is damaged: its bytes differ from {CHECKSUMS_FILE}; copy it again, or delete "
            f"{CHECKSUMS_FILE} if the weights were changed on purpose"
        )
