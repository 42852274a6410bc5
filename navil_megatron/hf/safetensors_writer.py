"""Safetensors files, written tensor by tensor at offsets that are known before the first is read.

The same tensors give the same bytes in whatever order and by however many processes they are written. Headers come
last, so that a file that is not complete cannot be opened. The library's writer takes all tensors of a file at once.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from navil_megatron.files.file_bytes import write_at, write_behind
from navil_megatron.hf.hf_parameters import Slot
from navil_megatron.hf.jobs import cut
from navil_megatron.hf.memory import raw_bytes
from navil_megatron.hf.safetensors_io import INDEX_FILE, SINGLE_FILE, TYPES

_NAMES = {dtype: name for name, dtype in TYPES.items()}
_SHARE_BYTES = 256_000_000


class SafetensorsWriter:
    """Writes the tensors of a folder. Pickles, so that processes can share it."""

    def __init__(self, folder: Path, targets: Sequence[tuple[Slot, torch.dtype]], max_file_bytes: int) -> None:
        """Lays out the files and makes them at their full size: a disk or a limit that is too small shows here.

        The folder holds ``targets`` in their order; one larger than ``max_file_bytes`` gets a file of its own.
        """
        self.folder, self.share_bytes = folder, _SHARE_BYTES
        self._place: dict[str, tuple[str, int]] = {}
        self._headers: dict[str, bytes] = {}
        self._num_bytes = 0
        slots = {slot.key: (slot, dtype) for slot, dtype in targets}
        pieces = cut({key: slot.num_bytes(dtype) for key, (slot, dtype) in slots.items()}, max_file_bytes)
        for number, keys in enumerate(pieces, 1):
            name = f"model-{number:05d}-of-{len(pieces):05d}.safetensors" if len(pieces) > 1 else SINGLE_FILE
            self._add_file(name, [slots[key] for key in keys])

    def write(self, share: int, tensors: Iterable[tuple[Slot, torch.Tensor]]) -> None:
        """Writes tensors to their places, in any order."""
        with ExitStack() as stack, write_behind() as wrote:
            files: dict[str, int] = {}
            for slot, tensor in tensors:
                name, position = self._place[slot.key]
                if name not in files:
                    files[name] = stack.enter_context((self.folder / name).open("r+b")).fileno()
                write_at(files[name], position, raw_bytes(tensor))
                wrote(files[name], tensor.nbytes)

    def finish(self, places: Iterable[None]) -> list[str]:
        """Writes the headers and the index; gives the names of all files."""
        for name, header in self._headers.items():
            with (self.folder / name).open("r+b") as file:
                file.write(header)
        names = list(self._headers)
        if len(names) > 1:
            weight_map = {key: name for key, (name, _) in self._place.items()}
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            names.append(INDEX_FILE)
        return names

    def _add_file(self, name: str, targets: list[tuple[Slot, torch.dtype]]) -> None:
        entries: dict[str, dict[str, Any]] = {}
        filled = 0
        # Wide numbers first keeps every tensor aligned to its numbers, as readers that map the file want it.
        for slot, dtype in sorted(targets, key=lambda target: -target[1].itemsize):
            end = filled + slot.num_bytes(dtype)
            entries[slot.key] = {"dtype": _NAMES[dtype], "shape": list(slot.shape), "data_offsets": [filled, end]}
            filled = end
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        for key, entry in entries.items():
            self._place[key] = (name, len(header) + entry["data_offsets"][0])
        self._headers[name] = header
        self._num_bytes += filled
        with (self.folder / name).open("wb") as file:
            file.truncate(len(header) + filled)
