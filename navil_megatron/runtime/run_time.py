"""How a run spent its time, across restarts, by its own records: ``metrics.jsonl`` in ``logging.directory``.

Useful is the time of steps whose update was made and that no restart undid, without their wait for data.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


@dataclass(slots=True)
class RunTime:
    """What the records so far come to."""

    first_start: float | None = None
    """Seconds since 1970, as all times."""
    num_starts: int = 0
    step: int = 0
    """The last one."""
    lost_steps: int = 0
    """Made, and made again after a restart."""
    skipped_steps: int = 0
    last_time: float = 0.0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By cause: ``lost steps``, ``data``, ``other ranks``, ``evaluation and saves``, ``between starts``."""
    slowest: Counter[int] = field(default_factory=Counter)
    """Records in which a rank was the slowest."""
    kept: list[tuple[int, float]] = field(default_factory=list)
    """Step and useful seconds of the records that no restart undid."""

    @property
    def useful_seconds(self) -> float:
        """Of all that is kept."""
        return sum(seconds for _, seconds in self.kept)

    def goodput(self, now: float) -> float:
        """Useful seconds over those since the first start."""
        return self.useful_seconds / max(now - (self.first_start or now), 1e-9)

    def start(self, step: int, now: float) -> None:
        """The run begins, or goes on, behind a step."""
        if self.first_start is None:
            self.first_start = now
        else:
            self.seconds["between starts"] += now - self.last_time
        self.lost_steps += max(0, self.step - step)
        self.seconds["lost steps"] += sum(seconds for done, seconds in self.kept if done > step)
        self.kept = [(done, seconds) for done, seconds in self.kept if done <= step]
        self.num_starts, self.step, self.last_time = self.num_starts + 1, step, now

    def add(self, step: int, record: dict[str, Any]) -> None:
        """One record of kind ``train``."""
        num_steps = step - self.step
        self.kept.append((step, record["useful_seconds"]))
        self.skipped_steps += record["skipped_steps"]
        self.seconds["data"] += record["data_wait_seconds"] * num_steps
        self.seconds["other ranks"] += record["wait_seconds"] * num_steps
        self.seconds["evaluation and saves"] += record["paused_seconds"]
        self.slowest[record["slowest_rank"]] += 1
        self.step, self.last_time = step, record["time"]


def read_run_time(logs: Path) -> RunTime:
    """What the folder's records come to; records of a version that took no times are passed over."""
    path = logs / METRICS_FILE
    return run_time_of(path.read_text().splitlines() if path.exists() else ())


def run_time_of(lines: Iterable[str]) -> RunTime:
    """The same of lines; one that was cut short is passed over."""
    found = RunTime()
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == "start":
            found.start(record["step"], record["time"])
        elif record["kind"] == "train" and "useful_seconds" in record:
            found.add(record["step"], record)
    return found
