"""One step of a run again, by halves, until it is known which sample, layer and rank made its numbers bad.

The step is made from the newest checkpoint before it, with the same samples in the same order. If it comes out bad
again, so does one of its halves, and so on, down to one sample. If not, what made it bad was no part of the run.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from navil_megatron.checkpoint.finite import require_finite
from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loader import TrainLoader
from navil_megatron.data.plan import Row
from navil_megatron.kernels.amax_history import forget_bad_amax
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import place_of
from navil_megatron.training.failures import settle_failures
from navil_megatron.training.first_bad import Place, first_bad
from navil_megatron.training.lr_schedule import learning_rate
from navil_megatron.training.number_watch import FILE, NumberWatch
from navil_megatron.training.start import Run, start_run
from navil_megatron.training.step import StepResult, train_step

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """A sample of a step, by where it lies."""

    dp_rank: int
    row: int
    position: int


class Verdict(NamedTuple):
    """What a step of some samples came to."""

    why: str
    """Why its update is to be refused; empty: it is sound."""
    result: StepResult
    place: Place | None
    """The first place of all ranks where a number is none."""


def replay(config: NaViLConfig, session: Session, step: int) -> list[str]:
    """What is to be said of a step, line by line. Every rank calls it; nothing is written.

    Raises:
        UserError: The run never comes to this step, or its checkpoints or data cannot be read.
        BadNumbers: The checkpoint before it is not finite already.
    """
    if not 1 <= step <= config.training.train_steps:
        raise UserError(f"found step {step}, expected one of 1 to training.train_steps = {config.training.train_steps}")
    loader = session.together(lambda: TrainLoader(config, place_of(session)))
    run = start_run(config, session, CheckpointManager(config, session), before=step)
    if run.state.step:
        session.together(lambda: loader.restore(run.state.loader))
    replayed = Replay(config, session, loader, run, step)
    replayed.advance()
    session.together(lambda: require_finite(run.chunks, run.optimizer, session.rank))
    lines = replayed.find()
    loader.close()
    return lines


class Replay:
    """A run that stands before the step."""

    def __init__(self, config: NaViLConfig, session: Session, loader: TrainLoader, run: Run, step: int):
        self.config, self.session, self.loader, self.run, self.step = config, session, loader, run, step
        self._watch = NumberWatch(config, session, run.chunks, run.state)
        self._rows: list[list[Row]] = []

    def advance(self) -> None:
        """Makes the steps between the checkpoint and the step, as the run made them."""
        state = self.run.state
        while state.step < self.step - 1:
            microbatches, _ = settle_failures(self.session, next(self.loader).microbatches)
            lr = learning_rate(state.step + 1, self.config.optimizer, self.config.training.train_steps)
            result = train_step(
                self.config, self.session, self.run.chunks, self.run.optimizer, microbatches, lr, self._watch.judge
            )
            state.step += 1
            self._watch.remember(result)

    def find(self) -> list[str]:
        """Tries halves of the step's samples while one of them is bad."""
        self._rows = self.loader.rows_of_ranks(self.step - 1)
        parts = [
            Part(rank, number, position)
            for rank, rows in enumerate(self._rows)
            for number, row in enumerate(rows)
            for position in range(len(row.samples))
        ]
        verdict = self._try(parts)
        seen = f"loss {verdict.result.loss:.6g}, gradient norm {verdict.result.grad_norm:.6g}"
        if not verdict.why:
            return [f"step {self.step} is sound: {seen}", *self._machine_fault()]
        lines = [f"step {self.step} is bad again: {verdict.why} ({seen}), {len(parts)} samples"]
        while len(parts) > 1:
            halves = parts[: len(parts) // 2], parts[len(parts) // 2 :]
            tried = [(half, found) for half in halves if (found := self._try(half)).why]
            if not tried:
                break
            parts, verdict = tried[0]
            logger.info("%d samples: %s", len(parts), verdict.why)
        lines.append(f"{'sample' if len(parts) == 1 else 'samples, only together'}: {self._names(parts)}")
        if verdict.place is not None:
            lines.append(f"first number that is none: {verdict.place}, on rank {verdict.place.rank}")
        return lines

    def _try(self, parts: Sequence[Part]) -> Verdict:
        """The step with some of its samples and without an update."""
        session, groups = self.session, self.session.groups
        mine = [
            self._only(row, [part.position for part in parts if part[:2] == (groups.dp.rank(), number)])
            for number, row in enumerate(self._rows[groups.dp.rank()])
        ]
        microbatches, _ = settle_failures(session, session.together(lambda: self.loader.build(mine)))
        why: list[str] = []

        def judge(loss: float, grad_norm: float) -> str:
            why.append(self._watch.judge(loss, grad_norm))
            return "a replay"

        with first_bad(self.run.chunks, session.rank, groups.pp.rank(), groups.pp.size()) as found:
            result = train_step(self.config, session, self.run.chunks, self.run.optimizer, microbatches, 0.0, judge)
        for chunk in self.run.chunks:
            forget_bad_amax(chunk)
        places: list[Any] = [None] * session.world_size
        torch.distributed.all_gather_object(places, min(found, default=None))
        return Verdict(why[0], result, min((place for place in places if place), default=None))

    @staticmethod
    def _only(row: Row, positions: Sequence[int]) -> Row:
        chosen = list(positions)
        arrays = {name: getattr(row, name)[chosen] for name in ("sources", "indices", "dropped")}
        return replace(row, **arrays)

    def _names(self, parts: Sequence[Part]) -> str:
        samples = [self._rows[part.dp_rank][part.row].samples[part.position] for part in parts]
        sources = self.config.data.train_sources
        return ", ".join(f"{sample.number} of {sources[sample.source].index}" for sample in samples)

    def _machine_fault(self) -> list[str]:
        """What the run wrote of the step when it was bad."""
        path = Path(self.config.logging.directory) / FILE
        lines = path.read_text().splitlines() if path.exists() else []
        found = next((line for line in map(json.loads, lines) if line["step"] == self.step), None)
        if found is None:
            return [f"{path} does not name it either: the run found it sound too"]
        ranks = found["loss_not_finite_on_ranks"] or found["ranks"]
        names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        return [f"the run found {found['why']}, which did not happen again: a fault of the machine of {names}"]
