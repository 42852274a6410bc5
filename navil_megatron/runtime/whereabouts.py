"""Where a rank is, read when somebody asks: its position, its line, and its collectives in torch's flight recorder.

Tried over gloo with torch 2.11.0 and 2.14.1, where the recorder is on by itself; not over NCCL. gloo records no send
and no receive, and NCCL does not mark all of them as done: a wait between pipeline stages is known by its line alone.
Where the recorder is off (``TORCH_FR_BUFFER_SIZE=0``), or has other fields, no collective is known.
"""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import megatron.core
import torch

from navil_megatron.runtime import wait_clock

_PLACES = {str(Path(__file__).parents[1]): "", str(Path(megatron.core.__file__).parent): "megatron/core"}
"""Folders whose lines name a place, and what stands for them in a report."""
_PEER_TO_PEER = "megatron/core/pipeline_parallel/p2p_communication.py"
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")  # torch's functions: of gloo, and of NCCL


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """What one rank answers when asked where it is; a flat record, so that it travels as JSON."""

    rank: int
    stage: int
    step: int
    """Step being made, from 1; 0: before the first."""
    position: str
    """What it began last; empty: no microbatch yet."""
    place: str
    """Its line, as of ``place_of``."""
    stalled_seconds: float
    """How long nothing has moved."""
    is_cut_off: bool
    """It lost its connections at this place."""
    begun: dict[str, int]
    """By process group, how many collectives it has begun, as far as the recorder holds them."""
    operation: str
    """What it waits for other ranks in; empty: it is not seen to wait."""
    group: str
    """Group of that collective, as in ``begun``."""
    number: int
    """Its number in the group, from 1; 0: none."""

    def __str__(self) -> str:
        """As it stands in a report."""
        since = "cut off" if self.is_cut_off else f"for {self.stalled_seconds:.0f} s"
        where = (f"in {self.operation} " if self.operation else "") + f"at {self.place or 'a line that is not ours'}"
        words = (f"step {self.step}", f"pipeline stage {self.stage}", self.position, f"{since} {where}")
        return f"rank {self.rank} ({', '.join(filter(None, words))})"


def read_waits(place: str) -> dict[str, Any]:
    """``begun``, ``operation``, ``group`` and ``number`` of a rank at this place; may be called from any thread."""
    in_pipeline = "send or receive between pipeline stages" if place.startswith(_PEER_TO_PEER) else ""
    waits: dict[str, Any] = {"begun": {}, "operation": in_pipeline, "group": "", "number": 0}
    # None of this is a promise of torch: without it, and with other fields in it, a report says less.
    with contextlib.suppress(Exception):
        dumps = [json.loads(getattr(torch._C._distributed_c10d, name, str)() or "{}") for name in _DUMPS]
        entries = [entry for dump in dumps for entry in dump.get("entries", ()) if not entry["is_p2p"]]
        for entry in sorted(entries, key=lambda entry: entry["time_created_ns"], reverse=True):
            # torch numbers groups alike everywhere, so a group has one name on all its ranks.
            group, number = " ".join(entry["process_group"]), entry["collective_seq_id"]
            waits["begun"].setdefault(group, number)
            if not entry["retired"]:  # in the end the oldest
                purpose = entry["process_group"][1].replace("default_pg", "all ranks")
                operation = f"{entry['profiling_name'].rpartition(':')[2]} of {purpose}"
                waits |= {"operation": operation, "group": group, "number": number}
    return waits


def place_of(frames: Iterable[FrameType]) -> str:
    """Of frames, innermost first, the first line that is ours or megatron-core's: ``folder/file.py:line function``.
    What times a collective is not where it was begun.
    """
    for frame in frames:
        code = frame.f_code
        if code.co_filename == wait_clock.__file__:
            continue
        for folder, prefix in _PLACES.items():
            if code.co_filename.startswith(f"{folder}/"):
                path = prefix + code.co_filename.removeprefix(folder)
                return f"{path.lstrip('/')}:{frame.f_lineno} {code.co_name}"
    return ""
