"""The progress bar of a run: steps, rate, time left and loss, on rank 0's terminal."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from navil_megatron.config.run import NaViLConfig
from navil_megatron.runtime.session import Session


class TrainingProgress:
    """A context that shows progress on rank 0 and does nothing on the others."""

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
        hidden = not (session.is_main and config.logging.progress)
        self._progress = Progress(*columns, console=Console(stderr=True), disable=hidden)
        self._task = self._progress.add_task(
            "train", total=config.training.train_steps, completed=step, loss=float("nan"), rate=0.0
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def update(self, step: int, record: dict) -> None:
        """Show the state after a step that was recorded."""
        self._progress.update(self._task, completed=step, loss=record["loss"], rate=record["tokens_per_second"])

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
