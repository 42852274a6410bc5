"""What each layout costs on ranks of this machine: step time, bytes sent by axis and collective, memory of a rank.

    python tools/bench/layouts.py [--layouts tp2,pp2] [--json]

Bytes are counted during one training step and stand beside what a formula of the layout and the batch's sizes says
(``planner/communication.py``); every rank is compared. Bytes are payload, the size of the whole tensor: input of an
all-reduce, output of an all-gather, input of a reduce-scatter, what is sent of an all-to-all or of a message.

Step times are of gloo ranks that share this machine's cores: they compare layouts no better than they would a cluster's
network. All layouts take the same global batch, so the work of a step is the same. State is weights, gradients and
optimizer state; its formula leaves out the distributed optimizer's padding. Peak is resident memory above what the
process held before the model was built, activations and allocator included (Linux only).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parent))
from small_run import mixed_row, one_sample_row, small_config, start_rank
from traffic_count import CountTraffic

from navil_megatron.config.schema import NaViLConfig
from navil_megatron.data.types import Microbatch
from navil_megatron.layers.vision_plan import plan_vision
from navil_megatron.models.build import build_model
from navil_megatron.planner.communication import (
    MicrobatchSizes,
    RankView,
    Traffic,
    TrafficTable,
    is_exact,
    traffic_of_step,
)
from navil_megatron.planner.memory import state_bytes
from navil_megatron.runtime.session import Session
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step

SHAPE = {"hidden": 256, "ffn": 768, "heads": 8, "groups": 4, "head_dim": 32, "vocabulary": 4096, "vision": 128}
GRID = (16, 16)
NUM_ROWS = 4

TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
WHOLE = {"distributed": False}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"optimizer": WHOLE}),
    "tp2": (2, {"parallel": TP2, "optimizer": WHOLE}),
    "tp2-sp": (2, {"parallel": TP2_SP, "optimizer": WHOLE}),
    "pp2": (2, {"parallel": PP2, "optimizer": WHOLE}),
    "pp2-uneven": (2, {"parallel": {**PP2, "pipeline_layers": [1, 3]}, "optimizer": WHOLE}),
    "pp2-interleaved": (2, {"parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2}, "optimizer": WHOLE}),
    "cp2": (2, {"parallel": {"context_parallel_size": 2}, "optimizer": WHOLE}),
    "ep2": (2, {"parallel": EP2, "optimizer": WHOLE}),
    "ep2-distributed": (2, {"parallel": EP2}),
    "dp2": (2, {"optimizer": WHOLE}),
    "dp2-distributed": (2, {}),
    "tp2-sp-pp2": (4, {"parallel": {**TP2_SP, **PP2}, "optimizer": WHOLE}),
    "tp2-sp-dp2": (4, {"parallel": TP2_SP, "optimizer": WHOLE}),
    "tp2-sp-dp2-distributed": (4, {"parallel": TP2_SP}),
}
"""Ranks, and the sections of the config that make the layout. ``distributed`` names the optimizer."""


def bench_config(layout: str, options: argparse.Namespace) -> NaViLConfig:
    """A NaViL small enough for four ranks on two cores."""
    sections = {name: dict(fields) for name, fields in LAYOUTS[layout][1].items()}
    return small_config(layers=4, tokens=options.tokens, precision=options.precision, shape=SHAPE, **sections)


def bench_rows(config: NaViLConfig) -> list[Microbatch]:
    """The global batch: rows with 80% visual tokens, and one of text alone."""
    rows = [mixed_row(config, seed, GRID) for seed in range(NUM_ROWS)]
    rows[1] = one_sample_row(config, 1, config.data.seq_length, [])
    return rows


def sizes_of(microbatch: Microbatch, config: NaViLConfig) -> MicrobatchSizes:
    """What the formula needs, counted on the host."""
    ranks = config.parallel.row_ranks
    grids = [(int(t), int(h), int(w)) for t, h, w in microbatch.image_grid_thw]
    num_visual = int(np.count_nonzero(microbatch.visual_token_mask))
    return MicrobatchSizes(
        num_predictions=int(np.count_nonzero(microbatch.labels != -100)),
        gathered_features=ranks * plan_vision(grids, config.model.vision, 0, ranks).gathered_tokens,
        rows_by_modality=(microbatch.visual_token_mask.size - num_visual, num_visual),
    )


def traffic_by_formula(view: RankView) -> TrafficTable:
    """The formula, where it is exact."""
    if not is_exact(view.config):
        raise SystemExit("the formula of the traffic is exact in phase s2, and with experts beside data parallelism")
    return traffic_of_step(view)


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
        size = len(rows) // session.dp_size
        self.shares = [rows[start : start + size] for start in range(0, len(rows), size)]

    def step(self) -> None:
        """One update."""
        train_step(self.config, self.session, self.chunks, self.optimizer, self.shares[self.session.dp_rank], lr=1e-3)

    def counted_step(self) -> TrafficTable:
        """One update, and what this rank sent in it. In its first one megatron-core also asks around, once, whether any
        parameter wants a gradient norm of its own.
        """
        with CountTraffic(self.session.groups) as counting:
            self.step()
        return dict(counting.found)

    def view(self) -> RankView:
        """What the formula may look at."""
        return RankView(
            config=self.config,
            pp_rank=self.session.pp_rank,
            dp_rank=self.session.dp_rank,
            world_size=self.session.world_size,
            batch=[[sizes_of(row, self.config) for row in share] for share in self.shares],
            parameters=[{name: p.numel() for name, p in chunk.module.named_parameters()} for chunk in self.chunks],
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


def measure_rank(rank: int, layout: str, options: argparse.Namespace, folder: str) -> None:
    """Everything about one rank, written as JSON."""
    config = bench_config(layout, options)
    world_size = LAYOUTS[layout][0]
    with start_rank(config, rank, world_size, Path(folder) / "rendezvous") as session:
        rows = bench_rows(config)
        before = resident_bytes("VmRSS")
        trainer = Trainer(config, session, rows)
        trainer.step()
        counted = trainer.counted_step()
        seconds = []
        restart_peak()
        for _ in range(options.rounds):
            session.barrier()
            started = time.perf_counter()
            trainer.step()
            session.barrier()
            seconds.append(time.perf_counter() - started)
        peak = resident_bytes("VmHWM") - before
        view = trainer.view()
        expected = traffic_by_formula(view)
        found = {
            "step_seconds": statistics.median(seconds),
            "peak_bytes": peak,
            "state_bytes": trainer.state_bytes(),
            "state_bytes_formula": state_bytes(
                config, [item for chunk in view.parameters for item in chunk.items()], view.dp_size
            ).total,
            "traffic": compare(counted, expected),
        }
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))


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


def resident_bytes(field: str) -> int:
    """A field of this process's status: ``VmRSS`` now, ``VmHWM`` the most since ``restart_peak``. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell {field}: run the benchmark on Linux")


def restart_peak() -> None:
    """Forgets the highest resident memory so far."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(layout: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank of a layout found."""
    world_size = LAYOUTS[layout][0]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure_rank, (layout, options, folder), nprocs=world_size)
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(world_size)]


def show(layout: str, ranks: list[dict[str, Any]]) -> None:
    """A line of time and memory, then a line for each axis and collective: of the rank that sends most."""
    fullest = max(ranks, key=lambda rank: rank["state_bytes"])
    print(
        f"\n{layout}: {len(ranks)} ranks, step {ranks[0]['step_seconds']:.3f} s, fullest rank: "
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
    parser.add_argument("--rounds", type=int, default=5, help="timed steps")
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
        print(json.dumps({"equal": equal, "layouts": found, "options": vars(options), "torch": torch.__version__}))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
