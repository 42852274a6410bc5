"""The planner at scale: how fast an index opens, what a step's plan costs, how full and how even the rows are.

    python tools/bench/plan.py                          100 million samples; the index takes 3.2 GB of disk
    python tools/bench/plan.py --samples 1000000

The samples are drawn like the paper's (1,079 tokens each on average, multi-scale, heavy tail; see ``draw_samples``) and
their index is written as ``data index`` writes it. A process of its own then opens it and plans steps of 512 rows for
512 data-parallel ranks; time is CPU time of one core, memory the process's largest resident size. ``imbalance`` is the
work of the busiest rank over the mean, averaged over steps of ``--batch-rows`` rows, at the worst of 8 to 64 ranks. The
last line is JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools" / "bench"))

import numpy as np
from navil_2b import navil_2b_run

from navil_megatron.data.measure import Ruler
from navil_megatron.data.packing import deal_rows, imbalance
from navil_megatron.data.plan import DataPlan
from navil_megatron.data.shards.shard_index import IMAGE, SAMPLE, Shard, ShardEntries, SourceIndex, save_index

SAMPLES_PER_SHARD = 10_000
RANKS = 512
RANKS_OF_IMBALANCE = (8, 16, 32, 64)
_CHUNK = 1_000_000


def main() -> None:
    """Writes the index, measures in a new process, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000, help="of the synthetic index (100000000)")
    parser.add_argument("--steps", type=int, default=64, help="steps of 512 rows that are planned (64)")
    parser.add_argument("--batch-rows", type=int, default=448, help="rows of a step whose dealing is judged (448)")
    parser.add_argument(
        "--max-patches", type=int, default=4096, help="of an image: 4096, 12188 or 24576 by phase (4096)"
    )
    parser.add_argument("--folder", type=Path, help="where the index goes (a temporary folder)")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options)))
        return
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="navil-plan-", dir=options.folder) as folder:
        index = Path(folder) / "synthetic.index"
        write_index(index, options.samples)
        command = [sys.executable, __file__, "--measure", str(index), "--steps", str(options.steps)]
        command += ["--batch-rows", str(options.batch_rows), "--max-patches", str(options.max_patches)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = {"samples": options.samples, "index_gb": round(index.stat().st_size / 1e9, 3)} | json.loads(output)
    if not options.json:
        for name, value in result.items():
            print(f"{name:32} {value}")
    print(json.dumps(result))


def draw_samples(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples and images of an index: nine of ten are an image with a caption, the tenth is a document.

    Areas are log-normal around 0.4 megapixels, aspect ratios around 1, captions around 40 tokens, documents around 500.
    """
    random = np.random.default_rng(seed)
    samples, has_image = np.zeros(count, dtype=SAMPLE), random.random(count) >= 0.1
    captions, documents = random.normal(np.log(40), 0.9, count), random.normal(np.log(500), 1.1, count)
    tokens = np.exp(np.where(has_image, captions, documents)).clip(4, 15_000)
    samples["text_tokens"] = tokens
    samples["text_bytes"] = tokens * 4
    samples["num_images"] = has_image
    samples["first_image"] = np.cumsum(has_image) - has_image
    samples["text_block"], samples["name_blocks"] = np.arange(count) % SAMPLES_PER_SHARD * 300, 1
    images = np.zeros(int(has_image.sum()), dtype=IMAGE)
    area = np.exp(random.normal(np.log(0.4e6), 0.9, len(images))).clip(64 * 64, 3e7)
    aspect = np.exp(random.normal(0, 0.35, len(images))).clip(0.1, 10)
    images["height"], images["width"] = np.sqrt(area * aspect), np.sqrt(area / aspect)
    images["bytes"], images["block"] = area / 6, np.arange(len(images)) % SAMPLES_PER_SHARD * 300
    return samples, images


def write_index(path: Path, count: int) -> None:
    """An index of random samples, written piece by piece."""
    chunks = [(seed, min(_CHUNK, count - first)) for seed, first in enumerate(range(0, count, _CHUNK))]
    names = [
        Shard(f"{shard:06d}.tar", min(SAMPLES_PER_SHARD, count - first), 2**31, f"{shard:032x}")
        for shard, first in enumerate(range(0, count, SAMPLES_PER_SHARD))
    ]
    drawn = lambda: (ShardEntries(*draw_samples(size, seed), names[0], []) for seed, size in chunks)  # noqa: E731
    save_index(path, drawn, names, "00" * 16)


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Opens, plans and judges; in a process that has done nothing else."""
    config = navil_2b_run(max_image_pixels=options.max_patches * 256)
    started = time.perf_counter()
    index = SourceIndex(path)
    plan = DataPlan([index], [1.0], Ruler(config), seed=1, batch_rows=RANKS)
    open_seconds = time.perf_counter() - started
    started, cpu = time.perf_counter(), time.process_time()
    for step in range(options.steps):
        plan.rank_step(step, step % RANKS, RANKS)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - started
    peak_rss_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    batch = DataPlan([index], [1.0], Ruler(config), seed=1, batch_rows=options.batch_rows)
    uneven: dict[int, list[float]] = {ranks: [] for ranks in (*RANKS_OF_IMBALANCE, RANKS)}
    samples, tokens = [], 0
    for step in range(options.steps):
        rows = batch.step_rows(step)
        costs = np.array([row.cost for row in rows])
        for ranks in RANKS_OF_IMBALANCE:
            uneven[ranks].append(imbalance(costs, deal_rows(costs, ranks)))
        samples += [row.indices for row in rows]
        costs = np.array([row.cost for row in plan.step_rows(step)])
        uneven[RANKS].append(imbalance(costs, deal_rows(costs, RANKS)))
    chosen = np.concatenate(samples)
    measures = Ruler(config).measure(index, chosen)
    tokens = int((measures.num_text + measures.num_visual).sum())
    by_ranks = {str(ranks): round(float(np.mean(found)), 4) for ranks, found in uneven.items()}
    return {
        "open_seconds": round(open_seconds, 3),
        "plan_ms_per_step": round(cpu / options.steps * 1e3, 2),
        "plan_wall_ms_per_step": round(wall / options.steps * 1e3, 2),
        "peak_rss_gb": round(peak_rss_gb, 3),
        "tokens_per_sample": round(tokens / len(chosen), 1),
        "fill": round(tokens / (options.steps * options.batch_rows * config.data.seq_length), 4),
        "imbalance": max(by_ranks[str(ranks)] for ranks in RANKS_OF_IMBALANCE),
        "imbalance_by_ranks": by_ranks,
        "imbalance_worst_step": round(max(max(uneven[ranks]) for ranks in RANKS_OF_IMBALANCE), 4),
        "on_paper": {
            f"{size / 1e6:,.0f} million": {"index_gb": round(size * 38.4 / 1e9, 1), "shards": size // SAMPLES_PER_SHARD}
            for size in (600_000_000, 2_000_000_000)
        },
    }


if __name__ == "__main__":
    main()
