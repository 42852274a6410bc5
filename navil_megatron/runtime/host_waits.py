"""Where the host waits for the device, on a GPU that is not there: an error that names the line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple


class DeviceError(RuntimeError):
    """The host would wait for the device, or a tensor is on the wrong one of the two."""


class AllowedWait(NamedTuple):
    """A place where the host may wait."""

    path: str  # how the file's path ends
    function: str  # its name; "": any of the file
    reason: str


ALLOWED_WAITS = (
    AllowedWait(
        "navil_megatron/training/step.py",
        "_read_of_all_ranks",
        "loss and gradient norm: no update is made with bad ones",
    ),
    AllowedWait(
        "megatron/core/transformer/moe/token_dispatcher.py",
        "_maybe_dtoh_and_synchronize",
        "rows of each expert, by which the all-to-all is cut",
    ),
    AllowedWait("megatron/core/transformer/moe/moe_utils.py", "maybe_move_tensor_to_cpu", "the copy of those numbers"),
)
"""All that a step may wait for."""

_PACKAGE = str(Path(__file__).parents[1])
_ROOT = f"{Path(_PACKAGE).parent}/"
_STAND_INS = tuple(
    f"runtime/{name}.py" for name in ("fake_gpu", "fake_rank", "host_waits", "known_values", "live_bytes", "flop_count")
)
_met: set[AllowedWait] | None = None


@contextmanager
def watching() -> Iterator[set[AllowedWait]]:
    """Inside, what makes the host wait is an error; gives the waits that were allowed."""
    global _met
    _met = set()
    try:
        yield _met
    finally:
        _met = None


def wait(what: str) -> None:
    """The host waits for the device here.

    Raises:
        DeviceError: It is watched, and may not.
    """
    if _met is None:
        return
    frame = _innermost()
    path, function = (frame.f_code.co_filename, frame.f_code.co_name) if frame is not None else ("", "")
    allowed = [place for place in ALLOWED_WAITS if path.endswith(place.path) and function == place.function]
    if not allowed:
        raise DeviceError(f"the host waits for the device: {what} at {where()}")
    _met.update(allowed)


def where() -> str:
    """The innermost line of ours or of megatron-core that led here."""
    frame = _innermost()
    if frame is None:
        return "a place outside"
    return f"{frame.f_code.co_filename.removeprefix(_ROOT).rpartition('/site-packages/')[2]}:{frame.f_lineno}"


def _innermost() -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if (path.startswith(_PACKAGE) or "/megatron/core/" in path) and not path.endswith(_STAND_INS):
            return frame
        frame = frame.f_back
    return None
