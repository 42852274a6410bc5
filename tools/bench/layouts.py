"""What each layout costs on ranks of this machine: bytes sent by axis and collective, CPU seconds, memory of a rank.

    python tools/bench/layouts.py [--layouts tp2,pp2] [--tokens T] [--rounds N] [--json]

Bytes are counted during one training step and stand beside what a formula of the layout and the batch's sizes says
(``planner/communication.py``); every rank is compared. Bytes are payload, the size of the whole tensor: input of an
all-reduce, output of an all-gather, input of a reduce-scatter, what is sent of an all-to-all or of a message.

All layouts take the same global batch, so the work of a step is the same. Overhead is CPU seconds of all ranks over
those of one rank that does the step alone, less 1: median and middle half of the rounds. In a round the ranks take some
steps together, then each takes whole steps alone, all at once: both sides meet about the same contention for caches and
cores. Below a tenth it is noise. What gloo's threads add, which copy and sum what is sent, is told apart from the
ranks' own thread: work that every rank repeats, smaller matrices, more calls. CPU seconds know nothing of waiting, nor
of a cluster's network.

State is weights, gradients and optimizer state; its formula leaves out the distributed optimizer's padding. Peak is
resident memory above what the process held before the model was built, activations and allocator included (Linux only).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]
from small_run import mixed_row, one_sample_row, small_config
from traffic_count import CountTraffic
from turns import quartiles, resident_bytes, restart_peak

from navil_megatron.blueprint.held_parameters import HeldParameter
from navil_megatron.blueprint.parameters import parameter_of
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.types import ALONE, DataPlace, Microbatch
from navil_megatron.models.build import build_model
from navil_megatron.planner.communication import (
    MicrobatchSizes,
    RankTraffic,
    Traffic,
    TrafficTable,
    is_exact,
)
from navil_megatron.planner.memory import state_bytes
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import place_of
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.ranks import run_ranks, start_session

SHAPE = {"hidden": 256, "ffn": 768, "heads": 8, "groups": 4, "head_dim": 32, "vocabulary": 4096, "vision": 128}
GRID = (16, 16)
NUM_ROWS = 4
STEPS = 3
"""Timed in a row."""

TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
WHOLE = {"distributed": False}

Seconds = tuple[float, float]
"""CPU seconds of a process, and of them its own thread's."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"optimizer": WHOLE}),
    "tp2": (2, {"parallel": TP2, "optimizer": WHOLE}),
    "tp4-sp": (4, {"parallel": {**TP2_SP, "tensor_model_parallel_size": 4}, "optimizer": WHOLE}),
    "tp2-sp": (2, {"parallel": TP2_SP, "optimizer": WHOLE}),
    "pp2": (2, {"parallel": PP2, "optimizer": WHOLE}),
    "pp2-uneven": (2, {"parallel": {**PP2, "pipeline_layers": [1, 3]}, "optimizer": WHOLE}),
    "pp2-interleaved": (2, {"parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2}, "optimizer": WHOLE}),
    "cp2": (2, {"parallel": {"context_parallel_size": 2}, "optimizer": WHOLE}),
    "ep2": (2, {"parallel": EP2, "optimizer": WHOLE}),
    "ep2-distributed": (2, {"parallel": EP2}),
    "dp2": (2, {"optimizer": WHOLE}),
    "dp2-distributed": (2, {}),
    "dp4": (4, {"optimizer": WHOLE}),
    "tp2-sp-pp2": (4, {"parallel": {**TP2_SP, **PP2}, "optimizer": WHOLE}),
    "tp2-sp-dp2": (4, {"parallel": TP2_SP, "optimizer": WHOLE}),
    "tp2-sp-dp2-distributed": (4, {"parallel": TP2_SP}),
}
"""Ranks, and the sections of the config that make the layout. ``distributed`` names the optimizer."""


def bench_config(layout: str, options: argparse.Namespace) -> NaViLConfig:
    """A NaViL small enough for four ranks on two cores."""
    sections = {name: dict(fields) for name, fields in LAYOUTS[layout][1].items()}
    return small_config(layers=4, tokens=options.tokens, precision=options.precision, shape=SHAPE, **sections)


def bench_rows(config: NaViLConfig, place: DataPlace = ALONE) -> list[Microbatch]:
    """The global batch: rows with 80% visual tokens, and one of text alone."""
    rows = [mixed_row(config, seed, GRID, place) for seed in range(NUM_ROWS)]
    rows[1] = one_sample_row(config, 1, config.data.seq_length, [], place)
    return rows


def sizes_of(microbatch: Microbatch, config: NaViLConfig) -> MicrobatchSizes:
    """What the formula needs, counted on the host."""
    ranks = config.parallel.row_ranks
    num_visual = int(np.count_nonzero(microbatch.visual_token_mask))
    return MicrobatchSizes(
        num_predictions=int(np.count_nonzero(microbatch.labels != -100)),
        gathered_features=ranks * microbatch.vision_plan.gathered_tokens,
        text_tokens=microbatch.visual_token_mask.size - num_visual,
        visual_tokens=num_visual,
    )


def traffic_by_formula(rank: RankTraffic) -> TrafficTable:
    """The formula, where it is exact."""
    if not is_exact(rank.config):
        raise SystemExit("the formula of the traffic is exact in phase s2, and with experts beside data parallelism")
    return rank.of_step()


class Trainer:
    """One rank of a layout, ready to step.

    Args:
        config: The run.
        session: This rank.
        rows: The global batch, one row a microbatch; replicas take equal consecutive shares.
    """

    def __init__(self, config: NaViLConfig, session: Session, rows: Sequence[Microbatch]):
        self.config, self.session = config, session
        self.chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        self.optimizer = build_optimizer(config, self.chunks, session)
        size = len(rows) // session.groups.dp.size()
        self.shares = [rows[start : start + size] for start in range(0, len(rows), size)]

    def step(self) -> None:
        """One update."""
        train_step(
            self.config, self.session, self.chunks, self.optimizer, self.shares[self.session.groups.dp.rank()], lr=1e-3
        )

    def counted_step(self) -> TrafficTable:
        """One update, and what this rank sent in it. In its first one megatron-core also asks around, once, whether any
        parameter wants a gradient norm of its own.
        """
        with CountTraffic(self.session.groups) as counting:
            self.step()
        return dict(counting.found)

    def view(self) -> RankTraffic:
        """What the formula may look at."""
        return RankTraffic(
            config=self.config,
            pp_rank=self.session.groups.pp.rank(),
            dp_rank=self.session.groups.dp.rank(),
            world_size=self.session.world_size,
            batch=[[sizes_of(row, self.config) for row in share] for share in self.shares],
            parameters=[
                [
                    HeldParameter(name, tuple(p.shape), parameter_of(self.config.model, name))
                    for name, p in chunk.module.named_parameters()
                ]
                for chunk in self.chunks
            ],
        )

    def state_bytes(self) -> int:
        """Bytes of the tensors that outlive a step: weights, gradients, optimizer state. Shared storage counts once."""
        tensors = [p for chunk in self.chunks for p in chunk.parameters()]
        tensors += [p.main_grad for p in tensors]
        for part in self.optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                states = part.optimizer.state.values()
                tensors += [x for state in states for x in state.values() if torch.is_tensor(x)]
                tensors += [x for group in part.optimizer.param_groups for x in group["params"]]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.numel()}
        return sum(storages.values())


def measure_rank(rank: int, world_size: int, layout: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one rank."""
    config, alone = bench_config(layout, options), bench_config("one", options)
    together: list[Seconds] = []
    by_itself: list[Seconds] = []
    found: dict[str, Any] = {}
    for _ in range(options.rounds):
        before = resident_bytes("VmRSS")
        with start_session(rank, world_size, config) as session:
            trainer = Trainer(config, session, bench_rows(config, place_of(session)))
            trainer.step()
            if not found:
                found = measure_once(trainer, before)
            torch.distributed.barrier()
            together.append(cpu_seconds(trainer))
        with Session.start(alone) as session:
            trainer = Trainer(alone, session, bench_rows(alone))
            trainer.step()
            by_itself.append(cpu_seconds(trainer))
    return {**found, "cpu_seconds": together, "cpu_seconds_alone": by_itself}


def measure_once(trainer: Trainer, before: int) -> dict[str, Any]:
    """What is the same in every step; ``before``: resident bytes without the model."""
    counted = trainer.counted_step()
    restart_peak()
    trainer.step()
    peak, view = resident_bytes("VmHWM") - before, trainer.view()
    held = [piece for chunk in view.parameters for piece in chunk]
    return {
        "peak_bytes": peak,
        "state_bytes": trainer.state_bytes(),
        "state_bytes_formula": round(sum(state_bytes(trainer.config, held, len(view.batch)))),
        "traffic": compare(counted, traffic_by_formula(view)),
    }


def cpu_seconds(trainer: Trainer) -> Seconds:
    """Of some steps."""
    process, thread = time.process_time(), time.thread_time()
    for _ in range(STEPS):
        trainer.step()
    return time.process_time() - process, time.thread_time() - thread


def overhead(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """CPU seconds of all ranks over those of one alone, less 1: median, middle half, and what gloo's threads added."""
    shares, by_gloo, alone = [], [], []
    for number in range(len(ranks[0]["cpu_seconds"])):
        together = [rank["cpu_seconds"][number] for rank in ranks]
        single = [rank["cpu_seconds_alone"][number] for rank in ranks]
        one = statistics.fmean(process for process, _ in single)
        alone.append(one / STEPS)
        shares.append(sum(process for process, _ in together) / one - 1)
        beside = statistics.fmean(process - thread for process, thread in single)
        by_gloo.append((sum(process - thread for process, thread in together) - beside) / one)
    low, median, high = quartiles(shares)
    gloo = statistics.median(by_gloo)
    return {"median": median, "low": low, "high": high, "gloo": gloo, "alone": statistics.median(alone)}


def compare(counted: TrafficTable, expected: TrafficTable) -> list[dict[str, Any]]:
    """One entry for each axis and collective that either side knows."""
    entries = []
    for axis, collective in sorted({*counted, *expected}):
        mine, theirs = (table.get((axis, collective), Traffic()) for table in (counted, expected))
        entries.append(
            {
                "axis": axis,
                "collective": collective,
                "calls": mine.calls,
                "bytes": mine.num_bytes,
                "formula_calls": theirs.calls,
                "formula_bytes": theirs.num_bytes,
                "equal": mine == theirs,
            }
        )
    return entries


def measure(layout: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank of a layout found."""
    return run_ranks(LAYOUTS[layout][0], measure_rank, layout, options, timeout=900)


def show(layout: str, ranks: list[dict[str, Any]]) -> None:
    """A line of time and memory, then a line for each axis and collective: of the rank that sends most."""
    fullest, over = max(ranks, key=lambda rank: rank["state_bytes"]), overhead(ranks)
    print(
        f"\n{layout}: {len(ranks)} ranks, overhead {over['median']:.0%} ({over['low']:.0%} to {over['high']:.0%}; gloo "
        f"{over['gloo']:.0%}) of {over['alone']:.2f} CPU seconds, fullest rank: "
        f"state {fullest['state_bytes'] / 2**20:.2f} MiB (formula {fullest['state_bytes_formula'] / 2**20:.2f}), "
        f"peak {max(rank['peak_bytes'] for rank in ranks) / 2**20:.0f} MiB"
    )
    entries: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for rank in ranks:
        for entry in rank["traffic"]:
            entries.setdefault((entry["axis"], entry["collective"]), []).append(entry)
    for (axis, collective), found in sorted(entries.items()):
        most = max(found, key=lambda entry: max(entry["bytes"], entry["formula_bytes"]))
        equal = all(entry["equal"] for entry in found)
        print(
            f"  {axis:10} {collective:15} {most['calls']:5} calls {most['bytes']:12,} bytes   "
            f"formula {most['formula_calls']:5} calls {most['formula_bytes']:12,} bytes   "
            f"{'equal on every rank' if equal else 'DIFFERENT'}"
        )


def main() -> int:
    """Prints tables, or one JSON object last on stdout; exit code 1 where a count differs from the formula."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"comma-separated, of: {', '.join(LAYOUTS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    options = parser.parse_args()
    chosen = options.layouts.split(",")
    if unknown := [name for name in chosen if name not in LAYOUTS]:
        parser.error(f"unknown layout {unknown[0]}; there are {', '.join(LAYOUTS)}")
    found = {}
    for layout in chosen:
        found[layout] = measure(layout, options)
        show(layout, found[layout])
    equal = all(entry["equal"] for ranks in found.values() for rank in ranks for entry in rank["traffic"])
    print(f"\ncounted and formula: {'equal everywhere' if equal else 'DIFFERENT, see above'}")
    if options.json:
        overheads = {layout: overhead(ranks) for layout, ranks in found.items()}
        result = {"equal": equal, "overhead": overheads, "layouts": found, "options": vars(options)}
        print(json.dumps({**result, "torch": torch.__version__}))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
