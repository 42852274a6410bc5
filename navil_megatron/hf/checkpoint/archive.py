"""Any rows of the numbers of one chunk, as a tensor; of a stack of layers, one is read alone."""

import torch

from navil_megatron.files.archive import Numbers
from navil_megatron.files.file_bytes import read_into
from navil_megatron.hf.memory import raw_bytes


def read_rows(numbers: Numbers, rows: slice, target: torch.Tensor) -> None:
    """Fills ``target`` with some rows; compares the CRC if all numbers have to be read for it.

    Raises:
        ValueError: They are damaged.
    """
    whole = torch.empty(numbers.num_stored, dtype=target.dtype, device="meta")
    layout = whole.as_strided(numbers.shape, numbers.strides, numbers.first)
    wanted, first, count = layout[rows] if layout.dim() else layout, 0, numbers.num_stored
    if layout.is_contiguous() and layout.numel() == count:
        first, count = int(wanted.storage_offset()), wanted.numel()
    in_place = target.is_contiguous() and wanted.numel() == count and wanted.is_contiguous()
    stored = target if in_place else torch.empty(count, dtype=target.dtype)
    content = raw_bytes(stored)
    read_into(numbers.path, numbers.position + first * target.itemsize, content)
    if len(content) == numbers.num_bytes:
        numbers.require_same(content)
    if not in_place:
        target.copy_(stored.as_strided(wanted.shape, wanted.stride(), wanted.storage_offset() - first))
