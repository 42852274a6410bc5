"""Safetensors parts, written tensor by tensor at offsets that are known before the first is read.

The same tensors give the same bytes in whatever order and by however many processes they are written. Headers come
last, so that a part that is not complete cannot be opened. The library's writer takes all tensors of a part at once.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from navil_megatron.files.file_bytes import write_at, write_behind
from navil_megatron.hf.plan import Slot, Step, cut, num_bytes
from navil_megatron.hf.safetensors_io import INDEX_FILE, SINGLE_FILE, TYPES
from navil_megatron.hf.tensor_bytes import raw_bytes

_NAMES = {dtype: name for name, dtype in TYPES.items()}
_SHARE_BYTES = 256_000_000


class SafetensorsWriter:
    """Writes the tensors of a folder."""

    def __init__(self, folder: Path, targets: Sequence[tuple[Slot, torch.dtype]], max_part_bytes: int) -> None:
        """Lays out the parts.

        Args:
            folder: Where to.
            targets: Every tensor with its type, in the order in which the folder holds them.
            max_part_bytes: Largest part; a larger tensor gets a part of its own.
        """
        self.folder = folder
        self._place: dict[str, tuple[str, int]] = {}
        self._parts: dict[str, tuple[bytes, int]] = {}  # name -> header, bytes in all
        slots = {slot.key: (slot, dtype) for slot, dtype in targets}
        parts = cut({key: num_bytes(*target) for key, target in slots.items()}, max_part_bytes)
        for number, keys in enumerate(parts, 1):
            name = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else SINGLE_FILE
            self._add_part(name, [slots[key] for key in keys])

    def shares(self, steps: Sequence[Step]) -> list[list[Step]]:
        """The steps in pieces that different processes may do at the same time."""
        sizes = {index: sum(slot.num_elements for slot in step.targets) * 4 for index, step in enumerate(steps)}
        return [[steps[index] for index in piece] for piece in cut(sizes, _SHARE_BYTES)]

    def prepare(self) -> None:
        """Makes the files at their full size; a disk or a limit that is too small shows here."""
        for name, (_, size) in self._parts.items():
            with (self.folder / name).open("wb") as file:
                file.truncate(size)

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
        for name, (header, _) in self._parts.items():
            with (self.folder / name).open("r+b") as file:
                file.write(header)
        names = list(self._parts)
        if len(names) > 1:
            total = sum(size - len(header) for header, size in self._parts.values())
            weight_map = {key: name for key, (name, _) in self._place.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            names.append(INDEX_FILE)
        return names

    def _add_part(self, name: str, targets: list[tuple[Slot, torch.dtype]]) -> None:
        # Wide numbers first keeps every tensor aligned to its numbers, as readers that map the file want it.
        targets = sorted(targets, key=lambda target: -target[1].itemsize)
        entries: dict[str, dict[str, Any]] = {}
        filled = 0
        for slot, dtype in targets:
            end = filled + num_bytes(slot, dtype)
            entries[slot.key] = {"dtype": _NAMES[dtype], "shape": list(slot.shape), "data_offsets": [filled, end]}
            filled = end
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        for key, entry in entries.items():
            self._place[key] = (name, len(header) + entry["data_offsets"][0])
        self._parts[name] = header, len(header) + filled
