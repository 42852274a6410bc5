"""Where a rank is in its run, told from outside: the position that its step notes, and what its stack shows.

The step pays for a few assignments and one tensor hook a microbatch. Module, operation and line are read off the
stack of the training thread, and only when somebody asks.
"""

import linecache
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import megatron.core
import torch
from torch import nn

type Phase = Literal["start", "data", "step", "gradients", "update", "evaluation", "save"]

_PACKAGE = str(Path(__file__).resolve().parent.parent)
_COLLECTIVES = "/torch/distributed/distributed_c10d.py"
_PEER_TO_PEER = "/megatron/core/pipeline_parallel/p2p_communication.py"
_AUTOGRAD = "/torch/autograd/function.py"
_STARTS_COLLECTIVES = (_PACKAGE, str(Path(megatron.core.__file__).parent))
_MAX_NODES = 64
"""Autograd nodes looked at for the nearest weight."""


@dataclass(slots=True)
class Position:
    """What the training thread notes as it goes; the watchdog only reads it."""

    step: int = 0
    """Step being made, from 1."""
    phase: Phase = "start"
    """Part of the loop."""
    microbatch: int = 0
    """Microbatch whose pass began last, from 1; 0: none yet in this phase."""
    direction: str = ""
    """``forward`` or ``backward``."""
    num_marks: int = 0
    """Grows with every note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """What one rank answers when asked where it is; a flat record, so that it travels as JSON."""

    rank: int
    """Its number."""
    stage: int
    """Its pipeline stage."""
    step: int
    """As in ``Position``."""
    phase: Phase
    """As in ``Position``."""
    microbatch: int
    """As in ``Position``."""
    direction: str
    """As in ``Position``."""
    module: str
    """Innermost named module on the stack, decoder layers by their number in the whole model; empty: outside."""
    operation: str
    """What it waits for other ranks in; empty: it is not seen to wait."""
    place: str
    """Our innermost line."""
    stalled_seconds: float
    """For how long nothing has moved."""
    counts: dict[str, int]
    """Collectives begun, by what their process group is for and its name."""
    cut_off: bool
    """Others closed their connections while it waited."""


class ModuleNames:
    """Names of the modules and weights of this rank's chunks."""

    def __init__(self, chunks: Sequence[nn.Module] = ()) -> None:
        """Takes chunks as the loop holds them, wrapped or not."""
        self._modules: dict[int, str] = {}
        self._weights: dict[int, str] = {}
        for chunk in chunks:
            layers: dict[str, str] = {}
            for name, module in chunk.named_modules():
                number = getattr(module, "layer_number", None)
                if isinstance(number, int) and name.rpartition(".")[0].endswith("layers"):
                    layers[name] = f"{name.rpartition('.')[0]}.{number - 1}"
                if name:  # a wrapper's own work is none of a module
                    self._modules[id(module)] = _clean(name, layers) or type(module).__name__
            for name, weight in chunk.named_parameters():
                self._weights[id(weight)] = _clean(name.rpartition(".")[0], layers)

    def of_frame(self, frame: FrameType) -> str:
        """The module whose method this frame runs, or whose weight its backward pass leads to; empty: none."""
        values = frame.f_locals
        return self._modules.get(id(values.get("self")), "") or self._behind(values.get("ctx"))

    def _behind(self, node: Any) -> str:
        """Owner of the nearest weight that gradients flow to from an autograd node."""
        waiting, seen = deque([node] if isinstance(node, torch.autograd.graph.Node) else []), 0
        while waiting and seen < _MAX_NODES:
            node, seen = waiting.popleft(), seen + 1
            owner = self._weights.get(id(getattr(node, "variable", None)), "")
            if owner:
                return owner
            waiting += [following for following, _ in node.next_functions if following is not None]
        return ""


def _clean(name: str, layers: dict[str, str]) -> str:
    """A name without wrappers, its decoder layer by the number in the whole model."""
    for local, whole in layers.items():
        if name == local or name.startswith(f"{local}."):
            name = whole + name.removeprefix(local)
            break
    while name == "module" or name.startswith("module."):
        name = name.removeprefix("module").removeprefix(".")
    return name


def frames_of_step(training_thread: int) -> list[FrameType]:
    """Frames of the step, outermost first: of the training thread, and of autograd's own threads on a GPU."""
    frames: list[FrameType] = []
    for thread, innermost in sys._current_frames().items():
        stack = list(_outwards(innermost))[::-1]
        if thread == training_thread:
            frames = stack + frames
        elif thread != threading.get_ident() and any(frame.f_code.co_filename.endswith(_AUTOGRAD) for frame in stack):
            frames += stack
    return frames


def frames_of_error(trace: TracebackType | None) -> list[FrameType]:
    """Frames that an exception left behind, outermost first."""
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def module_of(frames: Iterable[FrameType], names: ModuleNames) -> str:
    """The innermost named module on a stack; empty: none."""
    return next(filter(None, (names.of_frame(frame) for frame in reversed(list(frames)))), "")


def operation_of(frames: Sequence[FrameType]) -> str:
    """What a stack waits for other ranks in, with its process group where that is known; empty: it does not wait."""
    for frame in reversed(frames):
        code = frame.f_code
        if code.co_filename.endswith(_PEER_TO_PEER):
            return "send or receive between pipeline stages"
        if code.co_filename.endswith(_COLLECTIVES):
            group = frame.f_locals.get("group") or torch.distributed.group.WORLD
            called = "collectives" if code.co_name == "_coalescing_manager" else code.co_name
            return f"{called} of {purpose(group)}"
    if frames:
        line = linecache.getline(frames[-1].f_code.co_filename, frames[-1].f_lineno)
        # Core starts some collectives and waits for them later: the wait itself has no frame of its own.
        if ".wait(" in line and frames[-1].f_code.co_filename.startswith(_STARTS_COLLECTIVES):
            return f"collective that {frames[-1].f_code.co_name} started"
    return ""


def purpose(group: Any) -> str:
    """What a process group is for, in megatron-core's words."""
    everyone = torch.distributed.group.WORLD
    if everyone is not None and group.group_name == everyone.group_name:
        return "all ranks"
    return str(group.group_desc)


def place_of(frames: Iterable[FrameType]) -> str:
    """Our innermost line on a stack, as ``folder/file.py:line function``."""
    for frame in reversed(list(frames)):
        if frame.f_code.co_filename.startswith(_PACKAGE):
            path = frame.f_code.co_filename.removeprefix(_PACKAGE).lstrip("/")
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
    return ""
