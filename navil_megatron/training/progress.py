"""How a run tells rank 0's stderr of itself: a bar on a terminal, a line a record where there is none."""

import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from navil_megatron.config.run import NaViLConfig
from navil_megatron.runtime.session import Session

logger = logging.getLogger(__name__)


class TrainingProgress:
    """A context that tells on rank 0, if ``logging.progress``, and does nothing on the others."""

    def __init__(self, config: NaViLConfig, session: Session, step: int):
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._tells = session.is_main and config.logging.progress
        self._has_bar = self._tells and sys.stderr.isatty()
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not self._has_bar)
        self._total = config.training.train_steps
        self._task = self._progress.add_task("train", total=self._total, completed=step, loss=float("nan"), rate=0.0)
        self._first_step, self._started = step, time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """Tell of a record, after its step."""
        self._progress.update(self._task, completed=step, loss=record["loss"], rate=record["tokens_per_second"])
        if self._tells and not self._has_bar:
            # By the clock: evaluations and saves that lie ahead take as long as those behind.
            per_step = (time.monotonic() - self._started) / (step - self._first_step)
            logger.info("%s", describe_record(step, record, per_step * (self._total - step)))

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """Tell of an evaluation."""
        if self._tells:
            logger.info(
                "evaluation at step %d: %s", step, ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            )

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def describe_record(step: int, record: Mapping[str, Any], seconds_left: float) -> str:
    """A record in a line: loss by kind, rate, memory, learning rate, norm, and the time that is left."""
    kinds = {name.removeprefix("loss_"): loss for name, loss in record.items() if name.startswith(("loss_", "loss/"))}
    by_kind = ", ".join(f"{name} {loss:.4f}" for name, loss in kinds.items())
    parts = [
        f"step {step}/{record['train_steps']}",
        f"loss {record['loss']:.4f}" + (f" ({by_kind})" if by_kind else ""),
        f"{record['tokens_per_second']:,.0f} tokens/s",
        *([f"MFU {record['mfu']:.1%}"] if "mfu" in record else []),
        f"{record['peak_memory_bytes'] / 1e9:.1f} GB",
        f"lr {record['lr']:.3g}",
        f"grad norm {record['grad_norm']:.3g}",
        *([f"{record['skipped_steps']} refused"] if record["skipped_steps"] else []),
        f"left {timedelta(seconds=round(seconds_left))}",
    ]
    return "  ".join(parts)
