"""Folders of safetensors files, read one tensor at a time.

Only headers are read to know what a folder holds. The library checks each header; the bytes of a tensor are then read
by its offsets. The library's readers hold the interpreter meanwhile (``pread``: another thread, which sleeps a
millisecond at a time, woke 70 times in 2.8 s), or count every file as memory of this process (``mmap``).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from navil_megatron.config.errors import UserError
from navil_megatron.files.checksums import read_checksums, require_digest
from navil_megatron.files.file_bytes import read_into
from navil_megatron.hf.hf_parameters import Slot
from navil_megatron.hf.memory import raw_bytes
from navil_megatron.hf.verify import Signature

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's name of a type -> ours. A type that is not listed is known by the format's name alone."""


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    position: int
    signature: Signature


class TensorFolder(Mapping[str, torch.Tensor]):
    """The tensors of a folder's safetensors files, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers of all files.

        Raises:
            UserError: A file is missing or damaged, or a key lies in two files or not where the index says.
        """
        self.folder = folder
        self._places: dict[str, _Place] = {}
        weight_map = _weight_map(folder)
        self.files = _files(folder, weight_map)
        for path in self.files:
            for key, place in _header(path):
                if key in self._places:
                    raise UserError(f"{key} lies in {self._places[key].file.name} and in {path.name}: keep one of them")
                self._places[key] = place
        self.checksums = read_checksums(folder)
        if weight_map is not None:
            self._require_index(weight_map)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.read(Slot(key, self._places[key].signature[0]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def signatures(self) -> dict[str, Signature]:
        """Shape and type of every tensor, from the headers."""
        return {key: place.signature for key, place in self._places.items()}

    def read(self, slot: Slot) -> torch.Tensor:
        """One tensor.

        Raises:
            UserError: Its file is damaged, or its type is none that we have.
        """
        place = self._places[slot.key]
        shape, dtype = place.signature
        if isinstance(dtype, str):
            raise UserError(f"{slot.key} in {place.file} has type {dtype}, which is not supported")
        tensor = torch.empty(shape, dtype=dtype)
        try:
            read_into(place.file, place.position, raw_bytes(tensor))
        except ValueError as error:
            raise UserError(f"{slot.key} in {place.file} is cut short ({error}): download or copy it again") from None
        if self.checksums is not None:
            require_digest(raw_bytes(tensor), slot.name, self.checksums, place.file)
        return tensor

    def _require_index(self, weight_map: Mapping[str, str]) -> None:
        """The files hold what the index says, each key where it says."""
        found = {key: place.file.name for key, place in self._places.items()}
        wrong = sorted(key for key in weight_map.keys() | found.keys() if weight_map.get(key) != found.get(key))
        if wrong:
            shown = ", ".join(f"{key} ({found.get(key, 'nowhere')})" for key in wrong[:5])
            raise UserError(
                f"{self.folder / INDEX_FILE} does not fit its files in {len(wrong)} of {len(found)} keys: {shown}; "
                "download or copy the folder again"
            )


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Key -> file name by the folder's index; ``None`` if a single file holds everything."""
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise UserError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: expected a folder with safetensors")
        return None
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        sound = bool(weight_map) and all(isinstance(name, str) for name in weight_map.values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{index} is not a safetensors index: expected JSON with a weight_map")
    return dict(weight_map)


def _files(folder: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    """The files that the index names, or the single one.

    Links that lead out of the folder are refused, but for Hugging Face's own cache, which is made of such links.
    """
    names: Sequence[str] = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise UserError(f"{folder / INDEX_FILE} names {name[:200]!r}, expected file names inside the folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which its index names: download or copy them")
    for name in names:
        found = (folder / name).resolve().parent
        if found not in (folder.resolve(), folder.resolve().parent.parent / "blobs"):
            raise UserError(f"{folder / name} is a link to {found}, outside the folder; copy the file there instead")
    return [folder / name for name in names]


def _header(path: Path) -> Iterator[tuple[str, _Place]]:
    """Every tensor of a file, by its header, which the library has found sound."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            text = file.read(int.from_bytes(file.read(8), "little"))
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): download or copy it again") from None
    header.pop("__metadata__", None)
    for key, entry in header.items():
        dtype = TYPES.get(entry["dtype"], entry["dtype"])
        yield key, _Place(path, 8 + len(text) + entry["data_offsets"][0], (tuple(entry["shape"]), dtype))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return content
