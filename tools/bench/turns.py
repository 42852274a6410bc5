"""Several ways to do the same work, timed in turns: seconds on a GPU, CPU seconds of this process on a CPU.

CPU seconds leave out the time in which other programs had the core. Take one thread: threads that wait spin, and that
counts. Ways take turns in every round, forwards and backwards, and a ratio is taken inside its round.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

type Work = Callable[[], Any]


def clock(device: torch.device) -> float:
    """Seconds, once all that was enqueued is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def take_turns(ways: Mapping[str, Work], rounds: int, device: torch.device, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each way in each round; ``warm`` rounds before them are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm + rounds):
        order = list(ways.items())
        for name, work in order[:: -1 if number % 2 else 1]:
            started = clock(device)
            work()
            if number >= warm:
                seconds[name].append(clock(device) - started)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Seconds of theirs over ours: the median, and between which values the middle half of the rounds lies."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, median, high = quartiles(ratios)
    return {
        "median": median,
        "low": low,
        "high": high,
        "ours_seconds": statistics.median(ours),
        "theirs_seconds": statistics.median(theirs),
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value three times itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """In fp32 only the order of sums differs; in bf16 every value is rounded on its way.

    Raises:
        AssertionError: More than that.
    """
    limit = 1e-5 if expected.dtype == torch.float32 else 0.05
    distance = (found.float() - expected.float()).norm() / expected.float().norm()
    assert distance <= limit, f"{what}: a relative distance of {distance:.2g} from ours"


def show(name: str, figures: Mapping[str, float]) -> str:
    """One line of a table."""
    return (
        f"{name:32} {figures['median']:.2f}x  ({figures['low']:.2f} to {figures['high']:.2f})  "
        f"ours {figures['ours_seconds']:.4f} s, peer {figures['theirs_seconds']:.4f} s"
    )


def peak_bytes(work: Work, device: torch.device) -> int:
    """Most bytes that the work has allocated at once, beyond what was there before: as torch's allocator saw it."""
    if device.type != "cpu":
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        work()
        return torch.accelerator.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(0, *accumulate(event.nbytes() for event in events))


def resident_bytes(field: str) -> int:
    """A field of this process's status: ``VmRSS`` now, ``VmHWM`` the most since ``restart_peak``. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell {field}: run the benchmark on Linux")


def restart_peak() -> None:
    """Forgets the highest resident memory so far."""
    Path("/proc/self/clear_refs").write_text("5")
