"""What the training thread does on the host for the inputs of a step, in milliseconds, and what it sends to the device.

A step of several rows of photo-like images, planned as the loader's threads plan it. On the training thread are then
left: its microbatches as model inputs, the weight of the global batch, and the counts of a record. No model runs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import numpy as np
import torch
from small_run import small_config

from navil_megatron.blueprint.flops import training_flops
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loss_groups import group_weights
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.types import ALONE, Microbatch
from navil_megatron.runtime.platform import Platform
from navil_megatron.runtime.upload import exchanged
from navil_megatron.training.batch import build_model_inputs, upload_ahead
from tools.bench.synthetic import synthetic_microbatch


def photo_row(config: NaViLConfig, seed: int) -> Microbatch:
    """A row full of samples of an image in three scales and a caption."""
    random, samples, left = np.random.default_rng(seed), [], config.data.seq_length - 64
    while True:
        sides = 2 * random.integers(10, 32, 2)
        grids = [tuple((sides * scale / 2).astype(int) * 2) for scale in (0.5, 0.7071, 1.0)]
        caption = int(random.integers(20, 80))
        needed = caption + sum(rows * columns // 4 + rows // 2 + 3 for rows, columns in grids)
        if needed > left:
            return synthetic_microbatch(config.model, config.data.seq_length, seed, [samples])
        samples.append((caption, [(int(rows), int(columns)) for rows, columns in grids]))
        left -= needed


def uploaded_bytes(microbatches: Sequence[Microbatch]) -> int:
    """Bytes of all tensors that the model takes."""
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[id(tensor)] = tensor.nbytes
        return tensor

    held = [build_model_inputs(microbatch) for microbatch in microbatches]
    exchanged(held[0], note)
    for inputs in held[1:]:
        exchanged(inputs, note)
    return sum(sizes.values())


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    """Median CPU time of this thread over the rounds; one before them is not counted."""
    found = []
    for _ in range(rounds + 1):
        begun = time.thread_time()
        work()
        found.append((time.thread_time() - begun) * 1e3)
    return statistics.median(found[1:])


def measure(config: NaViLConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds by what is done, and bytes."""
    rows = [photo_row(config, seed) for seed in range(options.rows)]
    platform = Platform.from_config(config.runtime, 0)

    def plan() -> None:
        for row in rows:
            plan_microbatch(row, config.model, ALONE)

    def inputs() -> None:
        for _ in upload_ahead(rows, platform, with_images=True):
            pass

    def counts() -> None:
        sum(float(row.loss_weights.sum(dtype="float64")) for row in rows)
        sum(training_flops(config.model, row.workload, "s2") for row in rows)
        group_weights(rows, 2)
        sum(row.vision_plan.cost for row in rows)

    found = {name: milliseconds(work, options.rounds) for name, work in (("inputs", inputs), ("counts", counts))}
    return {
        "microbatches": len(rows),
        "patches": sum(row.vision_plan.patch_index.size for row in rows),
        "training_thread_ms": {name: round(value, 2) for name, value in found.items()},
        "loader_threads_ms": round(milliseconds(plan, options.rounds), 2),
        "uploaded_bytes": uploaded_bytes(rows),
    }


def main() -> int:
    """Prints a line a figure, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=4, help="microbatches of the step, a row each")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = small_config(layers=1, tokens=options.tokens, precision="bf16", runtime={"device": options.device})
    found = measure(config, options)
    for name, value in found.items():
        print(f"{name:20} {value}")
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
