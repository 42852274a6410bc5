"""Tensors of a checkpoint, one layer at a time, whatever layout saved it: rows and columns of tensor parallelism,
stages, experts, or whole stacks of layers in one chunk.
"""

from dataclasses import replace
from pathlib import Path

import torch

from navil_megatron.blueprint.parameters import checkpoint_shapes
from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.archive import find_numbers
from navil_megatron.files.checkpoint_folder import FORMAT_FILE, find_checkpoint, still_there
from navil_megatron.files.checkpoint_metadata import Chunk, read_metadata
from navil_megatron.files.checksums import read_checksums, require_digest
from navil_megatron.hf.checkpoint.archive import read_rows
from navil_megatron.hf.hf_parameters import Slot
from navil_megatron.hf.memory import raw_bytes
from navil_megatron.hf.verify import Signature, read_model_config, require_tensors


class CheckpointReader:
    """The model's tensors of a checkpoint folder; optimizer state is left out."""

    def __init__(self, folder: Path) -> None:
        """Reads the metadata and nothing else.

        Raises:
            UserError: The folder is not a complete checkpoint, or its metadata is damaged.
        """
        if not (folder / FORMAT_FILE).is_file():
            raise UserError(f"{folder} has no {FORMAT_FILE}: not a complete megatron-core checkpoint")
        self.folder = folder
        self.tensors = read_metadata(folder).weights
        self.checksums = read_checksums(folder)
        self._sound: set[Chunk] = set()

    def signatures(self) -> dict[str, Signature]:
        """Shape and type of every tensor, from the metadata."""
        return {key: (tensor.shape, getattr(torch, tensor.dtype)) for key, tensor in self.tensors.items()}

    def read(self, slot: Slot) -> torch.Tensor:
        """One tensor, or one layer of a stacked one, put together from the chunks that hold it.

        Raises:
            UserError: A file is damaged, or the checkpoint was deleted.
        """
        stored = self.tensors[slot.key]
        offset, size = (0, stored.shape[0] if stored.shape else 1) if slot.layer is None else (slot.layer, 1)
        window = torch.empty((size, *stored.shape[1:]), dtype=getattr(torch, stored.dtype))
        place = self.folder
        for chunk in stored.chunks:
            start = chunk.offsets[0] if chunk.offsets else 0
            first = max(start, offset)
            last = min(start + (chunk.sizes[0] if chunk.sizes else 1), offset + size)
            if first < last:
                place = self.folder / chunk.place.file
                box = [slice(first - offset, last - offset)]
                box += [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
                with still_there(self.folder):
                    self._read_rows(slot, chunk, slice(first - start, last - start), window[tuple(box)])
        tensor = window.view(slot.shape)
        if self.checksums is not None:
            hashed = {slot.name: window}
            if slot.layer is None and slot.name not in self.checksums and f"{slot.key}[0]" in self.checksums:
                hashed = {f"{slot.key}[{layer}]": rows for layer, rows in enumerate(window)}
            for name, rows in hashed.items():
                require_digest(raw_bytes(rows), name, self.checksums, place)
        return tensor

    def _read_rows(self, slot: Slot, chunk: Chunk, rows: slice, target: torch.Tensor) -> None:
        """Fills ``target`` with some rows of a chunk."""
        try:
            numbers = find_numbers(self.folder, chunk, self.tensors[slot.key].dtype)
            if self.checksums is not None:
                numbers = replace(numbers, crc=0)  # the hash of the whole slot says more
            elif rows != slice(0, chunk.sizes[0] if chunk.sizes else 1) and chunk not in self._sound:
                numbers.require_sound()
                self._sound.add(chunk)
            read_rows(numbers, rows, target)
        except ValueError as error:
            raise UserError(
                f"checkpoint {self.folder} is damaged: {slot.name} in {chunk.place.file} {error}; copy it again or use "
                "an older one"
            ) from None


def open_checkpoint(path: Path) -> tuple[ModelConfig, CheckpointReader]:
    """The model of a checkpoint, or of the newest one in a run's folder, and a reader that holds all of its tensors.

    Raises:
        UserError: There is none, or it is incomplete or damaged, or was deleted meanwhile.
    """
    folder = find_checkpoint(path)
    with still_there(folder):
        model, reader = read_model_config(folder), CheckpointReader(folder)
    require_tensors(reader.signatures(), checkpoint_shapes(model), f"checkpoint {folder}")
    return model, reader
