"""Standard logging, one line a record, told apart by rank; other libraries speak up only from warnings on."""

import logging
import sys
import warnings

from navil_megatron.config.errors import printable

_NOISY_LOGGERS = ("megatron", "torch", "DDP", "transformers", "PIL", "matplotlib")

_KNOWN_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "Transformer Engine is not installed",
    "MimoModelConfig is experimental",
    "TypedStorage is deprecated",
    ".*torch.distributed._.*_base.* is a private function",
    "Profiler function .* will be ignored",
    "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    "full scope is deprecated",
    "torch.distributed is disabled, unavailable or uninitialized",
    "The argument order of",
    "Please use DTensor instead",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
)
"""Messages that say what the config already decides (which kernels run) or that only a library's author can act on."""


def quiet_known_warnings() -> None:
    """Hides warnings that no reader of a run's output can act on; call before megatron-core is first imported."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # megatron-core imports torch's extension builder, which reports a CUDA toolkit without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


class _OneLine(logging.Formatter):
    """A name that a record quotes can neither begin a line of its own nor steer the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """What is said, in a line; a traceback follows in its own."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def configure_logging(rank: int, world_size: int) -> None:
    """Sends records to stderr: everything from rank 0, warnings and errors from the others."""
    handler = logging.StreamHandler(sys.stderr)
    who = f"[rank {rank}/{world_size}] " if world_size > 1 else ""
    handler.setFormatter(_OneLine(f"%(asctime)s %(levelname)s {who}%(name)s: %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("navil_megatron")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
