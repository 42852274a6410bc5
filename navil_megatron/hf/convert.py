"""Runs the jobs of a conversion: reads, rearranges, writes, and reads everything back.

Bytes stream through bounded memory: while one job is written the next is read, and nothing else is held. Several
processes share the jobs; what they write does not depend on their number.
"""

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, TypedDict, Unpack

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.files.atomic_folder import flush_folder
from navil_megatron.files.checksums import write_checksums
from navil_megatron.files.hashes import digest
from navil_megatron.files.worker_pool import Meter, OnProgress, run_shares
from navil_megatron.hf.checkpoint.reader import CheckpointReader
from navil_megatron.hf.checkpoint.writer import CheckpointWriter
from navil_megatron.hf.hf_parameters import Slot
from navil_megatron.hf.jobs import Job, cut, targets, total_bytes
from navil_megatron.hf.memory import keep_freed_memory, raw_bytes
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.safetensors_writer import SafetensorsWriter
from navil_megatron.hf.verify import is_finite

_CHECK_BYTES = 256_000_000
_AHEAD = 2
_NAMED = 5

type Reader = CheckpointReader | TensorFolder
type Writer = CheckpointWriter | SafetensorsWriter


class HowToRun(TypedDict, total=False):
    """What every conversion can be told."""

    verify: bool
    """Read everything back and compare hashes of every tensor (as is)."""
    num_processes: int
    """Processes that work at the same time (1)."""
    on_progress: OnProgress | None
    """Is told the bytes written and read back, and the bytes in all."""


def run_jobs(jobs: Sequence[Job], reader: Reader, writer: Writer, **run: Unpack[HowToRun]) -> list[str]:
    """Does typed jobs (``with_types``) in a folder that is not yet in its place; gives the names of its files.

    Raises:
        UserError: The source is damaged, or its weights are not finite.
        OSError: The disk is full or failing, or what was read back is not what was written.
    """
    verify, num_processes = run.get("verify", True), run.get("num_processes", 1)
    total = total_bytes(jobs)
    meter = Meter(2 * total if verify else total, run.get("on_progress"))
    shares = cut({job: total_bytes([job]) for job in jobs}, writer.share_bytes)
    results = run_shares(partial(_write_share, reader=reader, writer=writer), shares, num_processes, meter, _prepare)
    if bad := [name for _, not_finite, _ in results for name in not_finite]:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise UserError(
            f"weights are not finite: {', '.join(bad[:_NAMED])}{more}; nothing was written: take an older checkpoint"
        )
    files = writer.finish(place for _, _, place in results)
    write_checksums(writer.folder, {name: value for digests, _, _ in results for name, value in digests.items()})
    if verify:
        flush_folder(writer.folder)  # so that the disk is read, not the memory of what was written
        written = TensorFolder if isinstance(writer, SafetensorsWriter) else CheckpointReader
        _read_back(targets(jobs), written(writer.folder), num_processes, meter)
    return files


def ahead[T, R](items: Iterable[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Every item with what was read of it; the next ones are read meanwhile."""
    left, waiting = iter(items), deque[tuple[T, Future[R]]]()
    with ThreadPoolExecutor(_AHEAD) as threads:
        while True:
            coming = islice(left, _AHEAD + 1 - len(waiting))
            waiting.extend((item, threads.submit(read, item)) for item in coming)
            if not waiting:
                return
            first, future = waiting.popleft()
            yield first, future.result()
            del future  # and with it what was read


def _prepare() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


def _write_share(
    number: int, jobs: Sequence[Job], tell: Callable[[int], None], *, reader: Reader, writer: Writer
) -> tuple[dict[str, str], list[str], Any]:
    """Hashes of the tensors of a share, names of those not finite, and what the writer says of their places."""
    digests, not_finite = {}, []

    def tensors() -> Iterator[tuple[Slot, torch.Tensor]]:
        for job, sources in ahead(jobs, lambda job: tuple(map(reader.read, job.sources))):
            for slot, tensor in zip(job.targets, job.function(sources), strict=True):
                tensor = tensor.to(job.dtype).contiguous()
                if tensor.shape != slot.shape:
                    raise RuntimeError(f"{slot.name} was to be {list(slot.shape)}, but is {list(tensor.shape)}")
                if not is_finite(tensor):
                    not_finite.append(slot.name)
                digests[slot.name] = digest(raw_bytes(tensor))
                yield slot, tensor
                tell(tensor.nbytes)

    place = writer.write(number, tensors())
    return digests, not_finite, place


def _read_back(written: Sequence[tuple[Slot, torch.dtype]], reader: Reader, num_processes: int, meter: Meter) -> None:
    """Compares what lies in the files with the hashes of what was to be written."""
    intended = {}
    for slot, dtype in written:
        layers = () if slot.layer is None else (slot.num_layers,)
        intended[slot.key] = ((*layers, *slot.shape), dtype)
    if reader.signatures() != intended:
        raise OSError(errno.EIO, "the headers read back different from what was written; the disk may be failing")
    pieces = cut({slot: slot.num_bytes(dtype) for slot, dtype in written}, _CHECK_BYTES)
    run_shares(partial(_check_share, reader=reader), pieces, num_processes, meter, _prepare)


def _check_share(number: int, slots: Sequence[Slot], tell: Callable[[int], None], *, reader: Reader) -> None:
    try:
        for _, tensor in ahead(slots, reader.read):
            tell(tensor.nbytes)
    except UserError as error:
        message = f"reads back different from what was written, the disk may be failing: {error}"
        raise OSError(errno.EIO, message) from None
