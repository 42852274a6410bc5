"""Hashes of tensors, kept in ``checksums.json`` beside what the converter writes and checked by whoever reads it."""

from collections.abc import Buffer, Mapping
from pathlib import Path

from navil_megatron.config.errors import UserError
from navil_megatron.files.hashes import digest
from navil_megatron.files.json_file import read_json, write_json

CHECKSUMS_FILE = "checksums.json"
_ALGORITHM = "xxh3_128"


def write_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Leaves the hashes, under the names of their slots, in the folder."""
    write_json(folder / CHECKSUMS_FILE, {"algorithm": _ALGORITHM, "tensors": dict(sorted(digests.items()))}, indent=1)


def read_checksums(folder: Path) -> dict[str, str] | None:
    """The hashes that lie in the folder; ``None`` if there are none.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        digests = content["tensors"]
        sound = content["algorithm"] == _ALGORITHM and all(isinstance(value, str) for value in digests.values())
    except (UserError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged: expected {_ALGORITHM} hashes as JSON; copy it again, or delete it")
    return dict(digests)


def require_digest(content: Buffer, name: str, expected: Mapping[str, str], place: Path) -> None:
    """Compares the bytes of a tensor that was read with the hash that was left of it.

    Raises:
        UserError: They differ.
    """
    if name not in expected:
        raise UserError(f"{place.parent / CHECKSUMS_FILE} has no hash of {name}; delete it if the weights were changed")
    if digest(content) != expected[name]:
        raise UserError(
            f"{name} in {place} is damaged: its bytes differ from {CHECKSUMS_FILE}; copy it again, or delete "
            f"{CHECKSUMS_FILE} if the weights were changed on purpose"
        )
