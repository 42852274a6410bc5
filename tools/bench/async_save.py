"""Share of time that a save every so many steps costs: waited for, beside the training (``checkpoint.async_save``), and
as a copy on this node (``checkpoint.local_directory``).

    python tools/bench/async_save.py [--every 50] [--rounds 2] [--json]

A round trains ``--every`` steps without a save and with one of each kind in their middle, in turns. ``lost`` is the
share of a round's wall time that is gone beside the round without a save; ``blocked`` is the share that the training
thread spent in the save and in its commit. On a CPU the writer takes cores too: leave it one.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from small_run import mixed_row, small_config, start_rank

from navil_megatron.checkpoint.local_copies import LocalCopies
from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.checkpoint.sharded import saved_bytes
from navil_megatron.config.run import NaViLConfig
from navil_megatron.models.build import build_model
from navil_megatron.runtime.session import Session
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step

WAYS = ("none", "waited", "beside", "copy")
_WARM_STEPS = 4


class Trainee:
    """A model that trains on one row, and saves."""

    def __init__(self, config: NaViLConfig, session: Session, options: argparse.Namespace) -> None:
        self.config, self.session, self.options, self.saves = config, session, options, 0
        self.model = build_model(config, session.groups, session.device)
        self.chunks = wrap_ddp(config, session, self.model)
        self.optimizer = build_optimizer(config, self.chunks, session)
        self.row = mixed_row(config, grid=(16, 16))
        self.manager, self.copies = CheckpointManager(config, session), LocalCopies(config, session)

    def round(self, way: str, every: int) -> tuple[float, float]:
        """Seconds of a round, and those of them that the training thread spent on its save."""
        blocked, started = 0.0, time.perf_counter()
        for step in range(1, every + 1):
            train_step(self.config, self.session, self.chunks, self.optimizer, [self.row], 1e-4)
            if way == "none":
                continue
            begun = time.perf_counter()
            if step == (every + 1) // 2:
                self.saves += 1
            if step == (every + 1) // 2 and way == "copy":
                self.copies.save(self.saves, self.model, self.optimizer, {})
            elif step == (every + 1) // 2:
                self.manager.save(self.saves, self.model, self.optimizer, {}, wait=way == "waited")
            elif step % self.options.record_every == 0:
                self.manager.settle()
            if step == every:
                self.manager.settle(wait=True)
                self.copies.settle()
            blocked += time.perf_counter() - begun
        return time.perf_counter() - started, blocked


def measure(trainee: Trainee, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, each share inside its round."""
    lost: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    blocked: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    steps = []
    every = trainee.options.every
    for way in WAYS:
        trainee.round(way, _WARM_STEPS)
    for number in range(rounds):
        found = {way: trainee.round(way, every) for way in WAYS[:: -1 if number % 2 else 1]}
        seconds = {way: round(found[way][0], 1) for way in WAYS}
        print(f"round {number + 1} of {rounds}, seconds: {seconds}", file=sys.stderr)
        steps.append(found["none"][0] / every)
        for way in WAYS[1:]:
            whole, inside = found[way]
            lost[way].append(1 - found["none"][0] / whole)
            blocked[way].append(inside / whole)
    return {
        "step_seconds": statistics.median(steps),
        "checkpoint_bytes": saved_bytes(trainee.config),
        "lost": {way: statistics.median(values) for way, values in lost.items()},
        "blocked": {way: statistics.median(values) for way, values in blocked.items()},
        "lost_range": {way: [min(values), max(values)] for way, values in lost.items()},
    }


def main() -> int:
    """Prints a line a figure, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=50, help="steps of a round, with one save in it")
    parser.add_argument("--record-every", type=int, default=10, help="steps between looks whether it is written")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--folder", type=Path, help="where checkpoints go, for instance on the disk in question")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="few CPUs multiply bf16 fast")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="navil-bench-", dir=options.folder) as folder:
        config = small_config(
            layers=options.layers,
            tokens=options.tokens,
            precision=options.precision,
            runtime={"device": options.device},
        )
        checkpoint = replace(config.checkpoint, directory=str(Path(folder) / "run"), keep_last=1, async_save=True)
        checkpoint = replace(checkpoint, local_directory=str(Path(folder) / "node"), local_every_steps=options.every)
        logging = replace(config.logging, directory=folder)
        config = replace(config, checkpoint=checkpoint, logging=logging)
        with start_rank(config, 0, 1, Path(folder) / "rendezvous") as session:
            found = measure(Trainee(config, session, options), options.rounds)
    for name, value in found.items():
        print(f"{name:20} {value}")
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
