"""What happens to bad steps: those whose loss or gradient norm is not finite, or whose norm is far over the usual.

Their update is refused on all ranks alike. What is known of them is written down, and too many of them end the run; its
checkpoints stay. All memory is in ``TrainingState``, so a resumed run decides as the straight one.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from navil_megatron.config.errors import BadNumbers
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.types import Microbatch, SampleId
from navil_megatron.kernels.amax_history import forget_bad_amax
from navil_megatron.runtime.session import Session
from navil_megatron.training.replica_check import ReplicaCheck
from navil_megatron.training.state import TrainingState, is_due
from navil_megatron.training.step import StepResult, not_finite

logger = logging.getLogger(__name__)

FILE = "bad_steps.jsonl"
"""In ``logging.directory``."""
_NORMS_KEPT, _NORMS_NEEDED, _STEPS_KEPT = 100, 20, 1_000


class NumberWatch:
    """Judges steps and keeps account of those it refused. The same on every rank, which all call each method alike."""

    def __init__(
        self,
        config: NaViLConfig,
        session: Session,
        chunks: Sequence[DistributedDataParallel],
        state: TrainingState,
        before_end: Callable[[], None] | None = None,
    ):
        """Watches a run. ``before_end`` is called on every rank before one that cannot go on ends."""
        self._config, self._session, self._chunks, self._state = config, session, chunks, state
        self._replicas, self._before_end = ReplicaCheck(session.groups, chunks), before_end

    def judge(self, loss: float, grad_norm: float) -> str:
        """Why the update is refused, or nothing; before the update, with the numbers of all ranks."""
        limit, norms = self._config.training.grad_norm_limit, self._state.recent_norms
        if problem := not_finite(loss, grad_norm):
            return problem
        if limit is not None and len(norms) >= _NORMS_NEEDED and grad_norm > limit * (usual := median(norms)):
            return f"gradient norm {grad_norm:.4g} is more than {limit:g} times the usual {usual:.4g}"
        return ""

    def settle(self, result: StepResult, microbatches: Sequence[Microbatch]) -> None:
        """After ``state.step`` counts the step: remembers it, writes it down if it was bad, compares replicas if due.

        Raises:
            BadNumbers: The run is to stop after this.
        """
        self.remember(result)
        if result.refused:
            too_many = self._too_many()
            self._write(result, microbatches, "stopped" if too_many else "skipped")
            if too_many:
                file = Path(self._config.logging.directory) / FILE
                self._end(
                    f"step {self._state.step}: {result.refused}; {too_many}. Nothing of it reached weights or "
                    f"checkpoints; its samples are in {file}"
                )

        every = self._config.runtime.check_replicas_every_steps
        if every is not None and is_due(self._state.step, every, self._config.training.train_steps):
            self.compare_replicas()

    def compare_replicas(self) -> None:
        """Compares the bits of all weights. A collective.

        Raises:
            BadNumbers: Some differ; the message names the first of them and the ranks.
        """
        difference = self._replicas.difference()
        if self._session.on_any_rank(bool(difference)):
            what = f"step {self._state.step}: replicas of a weight have not the same bits, a machine computes wrongly"
            advice = "Replace it and start again from a checkpoint of before"
            self._end(f"{what}: {difference}. {advice}" if difference else "")

    def remember(self, result: StepResult) -> None:
        """What later steps are judged by, after ``state.step`` counts this one."""
        state, step = self._state, self._state.step
        state.refused_steps = [refused for refused in state.refused_steps if refused > step - _STEPS_KEPT]
        if not result.refused:
            state.recent_norms = [*state.recent_norms, result.grad_norm][-_NORMS_KEPT:]
            return
        state.refused_steps.append(step)
        for chunk in self._chunks:
            forget_bad_amax(chunk)

    def _end(self, why: str) -> None:
        """Ends the run; every rank calls it, and the first that knows why says so."""
        if self._before_end is not None:
            self._before_end()
        self._session.together(lambda: _stop(why))

    def _too_many(self) -> str:
        training, refused = self._config.training, self._state.refused_steps
        # Steps that follow one another differ from their places by the same number.
        runs = [len(list(run)) for _, run in groupby(enumerate(refused), lambda pair: pair[1] - pair[0])]
        if training.on_bad_step == "stop":
            return 'training.on_bad_step = "stop"'
        if runs[-1] > training.max_bad_steps_in_a_row:
            return f"{runs[-1]} bad steps in a row, training.max_bad_steps_in_a_row = {training.max_bad_steps_in_a_row}"
        if len(refused) > training.max_bad_steps_per_1000:
            limit = training.max_bad_steps_per_1000
            return f"{len(refused)} bad steps among the last 1,000, training.max_bad_steps_per_1000 = {limit}"
        return ""

    def _write(self, result: StepResult, microbatches: Sequence[Microbatch], action: str) -> None:
        """One line in ``bad_steps.jsonl``: what was seen, and on which ranks and samples.

        Where the loss of some microbatches is not finite it names those alone, else all that the step held.
        """
        session, groups = self._session, self._session.groups
        is_bad = (~result.microbatch_loss_sums.isfinite()).tolist()
        chosen = [batch for batch, bad in zip(microbatches, is_bad, strict=True) if bad or not result.bad_ranks]
        samples = {sample for batch in chosen for sample in batch.samples}
        found: list[Any] = [None] * session.world_size
        torch.distributed.all_gather_object(found, (groups.dp.rank(), samples))
        replicas = {replica for replica, named in found if named}
        step, seen = self._state.step, f"loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"
        if not session.is_main:
            return
        logger.warning("step %d: %s (%s); update refused, %s", step, result.refused, seen, action)
        line = {
            "step": step,
            "why": result.refused,
            "action": action,
            "loss": finite_or_none(result.loss),
            "grad_norm": finite_or_none(result.grad_norm),
            "loss_not_finite_on_ranks": list(result.bad_ranks),
            "ranks": [rank for rank, (replica, _) in enumerate(found) if replica in replicas],
            "samples": self._by_source(set().union(*(named for _, named in found))),
        }
        path = Path(self._config.logging.directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def _by_source(self, samples: set[SampleId]) -> dict[str, list[int]]:
        """Path of a source's index -> numbers of samples in it."""
        sources = self._config.data.train_sources
        parts = groupby(sorted(samples), lambda sample: sample.source)
        return {sources[source].index: [sample.number for sample in part] for source, part in parts}


def _stop(why: str) -> None:
    if why:
        raise BadNumbers(why)


def finite_or_none(number: float) -> float | None:
    """As JSON has it, which knows no NaN."""
    return number if math.isfinite(number) else None
