"""What a run reports: one JSON line a record in ``metrics.jsonl``, the same numbers for TensorBoard and for W&B.

docs/watching.md says what each of them is.
"""

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from navil_megatron.blueprint.flops import training_flops
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loader import StepData
from navil_megatron.data.loss_groups import group_weights, losses_by_group, num_loss_groups
from navil_megatron.data.types import Microbatch
from navil_megatron.runtime.run_time import METRICS_FILE, read_run_time
from navil_megatron.runtime.session import Session
from navil_megatron.runtime.wait_clock import WaitClock
from navil_megatron.training.encoder_load import EncoderLoad
from navil_megatron.training.expert_load import ExpertLoad, balance
from navil_megatron.training.feature_scale import FeatureScale, scales
from navil_megatron.training.grad_norms import GradNorms
from navil_megatron.training.number_watch import finite_or_none
from navil_megatron.training.state import TrainingState
from navil_megatron.training.step import StepResult
from navil_megatron.training.wandb_run import WandbRun

logger = logging.getLogger(__name__)

Record = dict[str, float | int]


class MetricsLog:
    """Appends records, which carry the run's id; only rank 0 writes."""

    def __init__(self, config: NaViLConfig, session: Session, run_id: str):
        self.directory, self._run_id = Path(config.logging.directory), run_id
        self._file, self._tensorboard, self._wandb = None, None, None
        self._num_ranks = session.world_size
        if session.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._run_time = read_run_time(self.directory)
            self._file = (self.directory / METRICS_FILE).open("a", buffering=1)
            if config.logging.tensorboard:
                self._tensorboard = SummaryWriter(str(self.directory / "tensorboard"))
            if config.logging.wandb_project is not None:
                self._wandb = WandbRun(config)

    def start(self, step: int) -> None:
        """Append that the run begins, or goes on, behind a step."""
        if self._file is not None:
            now = time.time()
            self._run_time.start(step, now)
            started = {"kind": "start", "run": self._run_id, "step": step, "time": now, "ranks": self._num_ranks}
            self._file.write(json.dumps(started) + "\n")

    def write_train(self, step: int, record: Record) -> None:
        """Append a record of kind ``train``, with the time and the goodput up to then."""
        if self._file is not None:
            timed = record | {"time": time.time()}
            self._run_time.add(step, timed)
            self.write("train", step, timed | {"goodput": self._run_time.goodput(timed["time"])})

    def write(self, kind: str, step: int, record: Mapping[str, float | int]) -> None:
        """Append one record; ``kind`` is ``train``, ``feature_scale`` or ``evaluation``. An empty one is left out, and
        a number that is none is ``null``.
        """
        if self._file is None or not record:
            return
        values = {name: finite_or_none(value) for name, value in record.items()}
        line = {"kind": kind, "run": self._run_id, "step": step, **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        known = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in known.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **known})

    def write_failures(self, step: int, microbatches: Iterable[Microbatch]) -> None:
        """Append what this rank could not decode to ``failed_samples.jsonl``; any rank writes, a line at a time."""
        lines = []
        for failed in (failed for microbatch in microbatches for failed in microbatch.failures):
            logger.warning("step %d: %s: %s: %s; blank, no loss", step, failed.shard, failed.key, failed.reason)
            named = {"step": step, "shard": failed.shard, "key": failed.key, "reason": failed.reason}
            lines.append(json.dumps(named) + "\n")
        if lines:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / "failed_samples.jsonl").open("a") as file:
                file.write("".join(lines))

    def close(self) -> None:
        """Flush and close the files."""
        for file in (self._file, self._tensorboard):
            if file is not None:
                file.close()
        if self._wandb is not None:
            self._wandb.finish()


class StepMeter:
    """Adds up steps between two records. Nothing is read from the device until ``record``."""

    def __init__(
        self,
        config: NaViLConfig,
        session: Session,
        chunks: Sequence[nn.Module],
        optimizer: ChainedOptimizer,
        state: TrainingState,
    ):
        self.config, self.session = config, session
        language = config.model.language
        self._expert_load = ExpertLoad(chunks, language.num_layers, language.num_experts)
        self._encoder_load = EncoderLoad(session.device)
        self._grad_norms = GradNorms(chunks, optimizer, config.model)
        self.feature_scale = FeatureScale(config, chunks, session.groups, session.device, state)
        self._clock = WaitClock(session.platform)
        self._last_step, self._step_seconds = 0.0, 0.0
        self._waits: list[tuple[Any, Any]] = []
        self._reset()

    def restart(self) -> None:
        """Take the time spent on evaluation or a save out of the next record; steps not yet recorded keep theirs."""
        now = time.perf_counter()
        self._paused_seconds += now - self._last_step
        self._last_step = now
        self._clock.take()

    def close(self) -> None:
        """Takes no more times."""
        self._clock.close()

    def _reset(self) -> None:
        self._results: list[StepResult] = []
        self._counts = torch.zeros(7, dtype=torch.float64)
        self._group_weights = torch.zeros(num_loss_groups(self.config), dtype=torch.float64)
        self._imbalances: list[float] = []
        self._num_refused = 0
        self._wait_seconds = 0.0
        self._paused_seconds = 0.0
        self._started = self._last_step = time.perf_counter()

    def add(
        self,
        result: StepResult,
        microbatches: Sequence[Microbatch],
        data: StepData,
        num_failed: int,
        wait_seconds: float,
    ) -> None:
        """Count one step of this rank; ``num_failed`` is its replica's samples that failed to decode."""
        model, phase = self.config.model, self.config.training.phase
        visual = sum(microbatch.num_visual_tokens for microbatch in microbatches)
        text = sum(microbatch.num_tokens for microbatch in microbatches) - visual
        rows_tokens = sum(microbatch.input_ids.size for microbatch in microbatches)
        samples = sum(len(microbatch.samples) for microbatch in microbatches)
        shrunk = sum(microbatch.num_shrunk for microbatch in microbatches)
        flops = sum(training_flops(model, microbatch.workload, phase) for microbatch in microbatches)
        self._counts += torch.tensor(
            [text, visual, rows_tokens, samples, num_failed, shrunk, flops], dtype=torch.float64
        )
        # Only what was learned from is part of a mean.
        if not result.refused:
            self._group_weights += group_weights(microbatches, len(self._group_weights))
        self._expert_load.settle(not result.refused)
        self.feature_scale.settle(not result.refused)
        self._imbalances.append(data.imbalance)
        self._encoder_load.add(microbatches)
        self._num_refused += data.num_refused
        self._results.append(result)
        self._wait_seconds += wait_seconds
        now = time.perf_counter()
        self._step_seconds, self._waits = now - self._last_step, self._clock.take()
        self._last_step = now

    def record(self, lr: float) -> tuple[Record, Record]:
        """What the steps since the last record came to, over all ranks: the record of kind ``train``, and that of kind
        ``feature_scale``, empty where nothing was measured. Every rank must call it.
        """
        session = self.session
        session.platform.synchronize()
        seconds = time.perf_counter() - self._started - self._paused_seconds
        # Counts are the same on the ranks of one model replica, losses on those of one tensor-parallel group.
        replica_ranks = session.world_size // session.groups.dp.size()
        learned = [result for result in self._results if not result.refused]
        group_losses = torch.zeros_like(self._group_weights, device=session.device)
        for result in learned:
            group_losses += result.group_loss_sums
        counts, group_weights, group_losses, loads, sums_of_scale = self._over_ranks(
            self._counts / replica_ranks,
            self._group_weights / replica_ranks,
            group_losses / session.groups.tp.size(),
            self._expert_load.take(session.device),
            self.feature_scale.take(),
        )
        slowest = torch.tensor([self._wait_seconds, session.platform.peak_memory_bytes()], dtype=torch.float64)
        slowest = slowest.to(session.device)
        torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
        ranks = self._times_of_ranks()
        slowest_rank, factor, waiting = slowest_of(ranks)
        data_wait = slowest[0].item()
        grad_norm = self._results[-1].grad_norm
        text, visual, row_tokens, samples, failed, shrunk, flops = counts.tolist()
        weights = [float(result.loss_weight) for result in learned]
        losses = sum(result.loss * weight for result, weight in zip(learned, weights, strict=True))
        loss = losses / max(sum(weights), 1e-30) if learned else math.nan
        record: Record = {
            "train_steps": self.config.training.train_steps,
            "loss": loss,
            **losses_by_group([s.index for s in self.config.data.train_sources], group_losses, group_weights),
            "grad_norm": grad_norm,
            **self._grad_norms.take(grad_norm, session.device),
            "lr": lr,
            "step_seconds": seconds / len(self._results),
            "wait_seconds": waiting,
            "slowest_rank": slowest_rank,
            "slowest_rank_factor": factor,
            "paused_seconds": self._paused_seconds,
            "useful_seconds": max(0.0, seconds - data_wait) * len(learned) / len(self._results),
            "tokens_per_second": (text + visual) / seconds,
            "text_tokens_per_second": text / seconds,
            "visual_tokens_per_second": visual / seconds,
            "samples_per_second": samples / seconds,
            "samples": round(samples),
            "tokens": round(text + visual),
            "visual_share": visual / max(1.0, text + visual),
            "padding_share": 1.0 - (text + visual) / row_tokens,
            "data_wait_seconds": data_wait / len(self._results),
            "failed_samples": round(failed),
            "shrunk_samples": round(shrunk),
            "refused_samples": self._num_refused,
            "imbalance": sum(self._imbalances) / len(self._imbalances),
            "encoder_imbalance": self._encoder_load.take(),
            "peak_memory_bytes": round(slowest[1].item()),
            "flops_per_second": flops / seconds,
            **self._mfu(flops / seconds),
            "skipped_steps": len(self._results) - len(learned),
            **balance(loads),
        }
        self._reset()
        return record, scales(sums_of_scale)

    def _mfu(self, flops_per_second: float) -> Record:
        """Share of what the GPUs could do at their peak in BF16; nothing where that is not known."""
        peak = self.session.platform.peak_flops
        return {} if peak is None else {"mfu": flops_per_second / (peak * self.session.world_size)}

    def _times_of_ranks(self) -> Tensor:
        """[ranks, 2]: of the last step, seconds of own work, the wait for data included, and of waiting for others."""
        waited = sum(self.session.platform.seconds_between(*wait) for wait in self._waits)
        own = max(0.0, self._step_seconds - waited)
        mine = torch.tensor([own, waited], dtype=torch.float64, device=self.session.device)
        every = [torch.empty_like(mine) for _ in range(self.session.world_size)]
        torch.distributed.all_gather(every, mine)
        return torch.stack(every).cpu()

    def _over_ranks(self, *parts: Tensor) -> list[Tensor]:
        """The sums over all ranks, on the host."""
        sums = torch.cat([part.to(self.session.device).flatten() for part in parts])
        torch.distributed.all_reduce(sums)
        pieces = sums.cpu().split([part.numel() for part in parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def slowest_of(ranks: Tensor) -> tuple[int, float, float]:
    """The rank with most work of its own, that over the median rank's, and the mean wait for other ranks.

    ``ranks`` as ``StepMeter`` gathers them: [ranks, 2].
    """
    own, waited = ranks.unbind(1)
    return int(own.argmax()), float(own.max() / own.quantile(0.5).clamp(min=1e-9)), float(waited.mean())
