"""A checkpoint between its copy to host memory and its last file: written here, or beside the training.

What is written, and how, is megatron-core's: the request that its own queue of asynchronous saves would take.
"""

from functools import partial
from queue import Queue
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket

from navil_megatron.checkpoint.background_call import BackgroundCall

_Written = dict[int, list[Any]]
"""Number of a file of this rank -> what torch's metadata must say of its entries."""


class StagedSave:
    """Every rank holds one and calls its methods at the same point: ``write`` or ``start``, then ``finish``."""

    def __init__(self, request: AsyncRequest) -> None:
        """Copies from the device to host memory what this rank writes; afterwards the training may change it."""
        self._finalize = request.finalize_fns
        self._buckets: list[WriteBucket] | None = None
        self._call: BackgroundCall[_Written | Exception] | None = None
        if request.async_fn is not None and request.preload_fn is not None:
            # Kept until the files are there: memory that this process frees, it may use again under the other's eyes.
            self._buckets = request.preload_fn()
            self._results: Queue[_Written | Exception] = request.async_fn_args[2]
            self._transforms = request.async_fn.args[0]

    def write(self) -> None:
        """Writes this rank's files; ``finish`` raises what went wrong."""
        if self._buckets is not None:
            self._results.put(_write(self._transforms, self._buckets))

    def start(self) -> None:
        """Begins to write this rank's files in another process.

        On a CPU it writes the tensors themselves, as they are now: a fork shares memory until one side changes it.
        """
        if self._buckets is not None:
            try:
                self._call = BackgroundCall(partial(_write, self._transforms, self._buckets))
            except OSError as error:  # no memory for another process
                self._results.put(error)

    def is_written(self) -> bool:
        """Whether this rank's files are written, or failed."""
        return self._call is None or self._call.is_done()

    def finish(self) -> None:
        """Writes what makes one checkpoint of the files of all ranks; waits for them.

        Raises:
            CheckpointException: Some rank could not write; on every rank, and only rank 0 is told why.
        """
        if self._call is not None:
            self._results.put(self._call.result())
        for finalize in self._finalize:
            finalize()


def _write(transforms: list[Any], buckets: list[WriteBucket]) -> _Written | Exception:
    """What core's ``write_preloaded_data_multithread`` does, which loses the cause of a failure."""
    written: _Written = {}
    for number, bucket in enumerate(buckets):
        _, found = FileSystemWriterAsync.write_preloaded_data(
            transforms,
            local_proc_idx=number,
            write_bucket=bucket,
            results_queue=None,
            count_queue=None,
            use_fsync=True,
        )
        if isinstance(found, Exception):
            return found
        written[number] = found
    return written
