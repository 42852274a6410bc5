"""Some steps of a run under torch's profiler: a trace, a snapshot of GPU memory, and the longest kernels in the log."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from navil_megatron.config.run import NaViLConfig
from navil_megatron.runtime.session import Session

logger = logging.getLogger(__name__)

FOLDER = "profile"
"""In ``logging.directory``."""
NUM_KERNELS = 12
_MAX_MEMORY_EVENTS = 200_000


class StepProfiler:
    """Profiles ``training.profile_steps``, the first to the last, on ``training.profile_ranks``."""

    def __init__(self, config: NaViLConfig, session: Session):
        wanted = config.training.profile_steps
        self._steps = wanted if wanted is not None and session.rank in config.training.profile_ranks else None
        self._on_gpu = session.platform.name == "cuda"
        self._stem = Path(config.logging.directory) / FOLDER / f"rank{session.rank}"
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Starts with the first of the steps."""
        if self._steps is None or step != self._steps[0]:
            return
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MAX_MEMORY_EVENTS)
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()

    def after(self, step: int) -> bool:
        """Writes down what was seen, after the last of them; gives whether it did."""
        if self._profile is None or self._steps is None or step < self._steps[1]:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Writes down what was seen so far, where the run ends before the last of them."""
        if self._profile is None:
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profile.stop()
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        trace = self._stem.with_suffix(".trace.json")
        self._profile.export_chrome_trace(str(trace))
        written = [str(trace)]
        if self._on_gpu:
            memory = self._stem.with_suffix(".memory.pickle")
            torch.cuda.memory._dump_snapshot(str(memory))
            torch.cuda.memory._record_memory_history(enabled=None)
            written.append(str(memory))
        logger.warning("profile of steps %s: %s", " to ".join(map(str, self._steps or ())), ", ".join(written))
        for line in kernel_table(self._profile.key_averages(), self._on_gpu):
            logger.warning("%s", line)
        self._profile = None


def kernel_table(averages: Any, on_gpu: bool) -> list[str]:
    """The longest kernels: time, share of all, calls, name. Of a GPU its kernels, of a CPU torch's operators."""
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(averages, key=lambda row: -getattr(row, time_of))[:NUM_KERNELS]
    total = sum(getattr(row, time_of) for row in averages) or 1.0
    return [
        f"{getattr(row, time_of) / 1e3:10.2f} ms {getattr(row, time_of) / total:6.1%} {row.count:7} x {row.key[:90]}"
        for row in rows
    ]
