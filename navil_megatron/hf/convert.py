"""Runs the steps of a conversion: reads, rearranges, writes, and reads everything back.

Bytes stream through bounded memory: while one step is written the next is read, and nothing else is held. Several
processes share the steps; what they write does not depend on their number.
"""

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.files.atomic_folder import flush_folder
from navil_megatron.files.checksums import write_checksums
from navil_megatron.files.hashes import digest
from navil_megatron.files.worker_pool import Meter, OnProgress, run_shares
from navil_megatron.hf.memory import keep_freed_memory
from navil_megatron.hf.plan import Slot, Step, cut, num_bytes
from navil_megatron.hf.tensor_bytes import raw_bytes
from navil_megatron.hf.verify import Signature

_CHECK_BYTES = 256_000_000
_AHEAD = 2


class Reader(Protocol):
    """A source of tensors. Pickles, so that processes can share it."""

    def signatures(self) -> dict[str, Signature]:
        """Shape and type under each key, without reading numbers."""

    def read(self, slot: Slot) -> torch.Tensor:
        """One tensor."""


class Writer(Protocol):
    """A place for tensors. Pickles, so that processes can share it."""

    folder: Path

    def shares(self, steps: Sequence[Step]) -> list[list[Step]]:
        """The steps in pieces that processes may do in any order, each whole."""

    def prepare(self) -> None:
        """Comes once, before the first share."""

    def write(self, share: int, tensors: Iterable[tuple[Slot, torch.Tensor]]) -> Any:
        """Writes the tensors of a share."""

    def finish(self, places: Iterable[Any]) -> list[str]:
        """Comes once, with what ``write`` gave for every share; gives the files' names."""


def with_types(steps: Sequence[Step], found: Mapping[str, Signature], dtype: torch.dtype | None) -> list[Step]:
    """The steps with the type of their targets filled in.

    Args:
        steps: What to do.
        found: Shape and type of the sources.
        dtype: Type of all targets; ``None``: what the step says, or else as its sources are.
    """
    typed = []
    for step in steps:
        kind = dtype or step.dtype or found[step.sources[0].key][1]
        if isinstance(kind, str):
            raise UserError(f"{step.sources[0].key} has type {kind}, which is not supported")
        typed.append(replace(step, dtype=kind))
    return typed


def targets(steps: Iterable[Step]) -> list[tuple[Slot, torch.dtype]]:
    """Every tensor that typed steps write, with its type."""
    return [(slot, step.dtype) for step in steps for slot in step.targets if step.dtype is not None]


def total_bytes(steps: Iterable[Step]) -> int:
    """Bytes of every tensor that typed steps write."""
    return sum(num_bytes(slot, dtype) for slot, dtype in targets(steps))


def run_steps(
    steps: Sequence[Step],
    reader: Reader,
    writer: Writer,
    reopen: Callable[[Path], Reader],
    *,
    jobs: int = 1,
    verify: bool = True,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """Does a conversion in a folder that is not yet in its place.

    Args:
        steps: What to do, with types (``with_types``).
        reader: Where from.
        writer: Where to.
        reopen: Opens what was written.
        jobs: Processes.
        verify: Read everything back and compare hashes of every tensor.
        on_progress: Is told the bytes written and read back.

    Returns:
        The names of the files.

    Raises:
        UserError: The source is damaged.
        OSError: The disk is full or failing, or what was read back is not what was written.
    """
    written = targets(steps)
    total = total_bytes(steps)
    meter = Meter(2 * total if verify else total, on_progress)
    writer.prepare()
    work = partial(_write_share, reader=reader, writer=writer)
    results = run_shares(work, writer.shares(steps), jobs, meter, _prepare)
    files = writer.finish(place for _, place in results)
    write_checksums(writer.folder, {name: value for digests, _ in results for name, value in digests.items()})
    if verify:
        flush_folder(writer.folder)  # so that the disk is read, not the memory of what was written
        _read_back(written, reopen(writer.folder), jobs, meter)
    return files


def ahead[T, R](items: Iterable[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Every item with what was read of it; the next ones are read meanwhile."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(_AHEAD) as threads:
        for item in items:
            waiting.append((item, threads.submit(read, item)))
            if len(waiting) > _AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
                del future  # and with it what was read
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
            del future


def _prepare() -> None:
    """Of a process that shares the steps."""
    torch.set_num_threads(1)
    keep_freed_memory()


def _write_share(
    number: int, steps: Sequence[Step], tell: Callable[[int], None], *, reader: Reader, writer: Writer
) -> tuple[dict[str, str], Any]:
    """Hashes of the tensors of a share, and what the writer says of their places."""
    digests = {}

    def tensors() -> Iterator[tuple[Slot, torch.Tensor]]:
        for step, sources in ahead(steps, lambda step: tuple(map(reader.read, step.sources))):
            for slot, tensor in zip(step.targets, step.function(sources), strict=True):
                tensor = tensor.to(step.dtype).contiguous()
                if tensor.shape != slot.shape:
                    raise RuntimeError(f"{slot.name} was to be {list(slot.shape)}, but is {list(tensor.shape)}")
                digests[slot.name] = digest(raw_bytes(tensor))
                yield slot, tensor
                tell(tensor.nbytes)

    place = writer.write(number, tensors())
    return digests, place


def _read_back(written: Sequence[tuple[Slot, torch.dtype]], reader: Reader, jobs: int, meter: Meter) -> None:
    """Compares what lies in the files with the hashes of what was to be written."""
    intended = {}
    for slot, dtype in written:
        layers = () if slot.layer is None else (slot.num_layers,)
        intended[slot.key] = ((*layers, *slot.shape), dtype)
    if reader.signatures() != intended:
        raise OSError(errno.EIO, "the headers read back different from what was written; the disk may be failing")
    pieces = cut({slot: num_bytes(slot, dtype) for slot, dtype in written}, _CHECK_BYTES)
    run_shares(partial(_check_share, reader=reader), pieces, jobs, meter, _prepare)


def _check_share(number: int, slots: Sequence[Slot], tell: Callable[[int], None], *, reader: Reader) -> None:
    try:
        for _, tensor in ahead(slots, reader.read):
            tell(tensor.nbytes)
    except UserError as error:
        message = f"reads back different from what was written, the disk may be failing: {error}"
        raise OSError(errno.EIO, message) from None
