"""The paper's findings asked again at a small scale: trains what a study compares and draws what came out.

    python tools/study/run.py a            # or b, c, d, e, f, or all
    python tools/study/run.py a --rates 5e-4 1e-3 2e-3      # every arm at its own best learning rate
    python tools/study/run.py d --scale gpu --jobs 1
    python tools/study/run.py all --report # only draws, from the runs that are done

Stopped and started again it goes on: finished runs are kept, a run that was cut short goes on from its checkpoint.
Everything lands in ``runs/study/SCALE``. ``arms.py`` says what is compared, ``cpu.toml`` and ``gpu.toml`` how.
"""

import argparse
import json
import logging
import multiprocessing
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console

from examples.quickstart.scenes import build_scenes
from tools.study.arms import SCALES, Scale, Study, studies
from tools.study.one_run import RESULT, run
from tools.study.report import write_report

PRELOAD = [
    "navil_megatron.runtime.session",
    "navil_megatron.training.loop",
    "navil_megatron.hf.llm.ingest",
    "transformers",
]
SEEDS = 3
console = Console(highlight=False)

type Job = tuple[str, Callable[..., None], tuple]
"""Name, function at module level, arguments."""


def main() -> int:
    """Prepares, trains, reports. 1: a run failed; the others are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*"abcdef", "all"])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of every arm ({SEEDS})")
    parser.add_argument(
        "--rates", type=float, nargs="+", metavar="RATE", help="learning rates to try for every arm (the config's)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one core each (2)")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--docs", type=Path, help="write tables and pictures into this copy of docs/")
    options = parser.parse_args()
    scale, folder = SCALES[options.scale], options.folder / options.scale
    wanted = studies(scale)
    chosen = wanted if options.study == "all" else {options.study: wanted[options.study]}
    rates = rates_of_arms(scale, options.rates)
    failed = [] if options.report else train_all(scale, chosen, folder, options.seeds, rates, options.jobs)
    for letter, study in chosen.items():
        write_report(letter, study, folder, options.seeds, rates, options.docs, console)
    for name in failed:
        console.print(f"[red]{name} failed; its words are in {folder / 'runs' / name / 'log.txt'}[/red]")
    return 1 if failed else 0


def rates_of_arms(scale: Scale, rates: list[float] | None) -> dict[float, float | None]:
    """Learning rate -> ``Arm.rate``: the config's own is None, so its runs serve with and without others."""
    usual = tomllib.loads(Path(__file__).with_name(scale.config).read_text())["optimizer"]["lr"]
    return {rate: None if rate == usual else rate for rate in sorted(rates or [usual])}


def train_all(
    scale: Scale, chosen: dict[str, Study], folder: Path, seeds: int, rates: dict[float, float | None], jobs: int
) -> list[str]:
    """Every run of the chosen studies that has no result yet. -> the names of those that failed."""
    compared = [arm for study in chosen.values() for arm in study.arms.values()]
    arms = {arm.name: arm for rate in rates.values() for arm in (replace(one, rate=rate) for one in compared)}
    data = prepare(scale, folder, {arm.llm for arm in arms.values()}, jobs)
    # Seed by seed: a study that is cut short has whole comparisons.
    places = {
        folder / "runs" / f"{arm.name}_seed{seed}": (arm, seed) for seed in range(1, seeds + 1) for arm in arms.values()
    }
    todo: list[Job] = [
        (place.name, run, (scale, arm, seed, data, folder / "llms" / arm.llm, place))
        for place, (arm, seed) in places.items()
        if not (place / RESULT).exists()
    ]
    console.print(f"{len(places)} runs, {len(todo)} to do")
    return run_jobs(todo, folder / "runs", jobs)


def prepare(scale: Scale, folder: Path, llms: Iterable[str], jobs: int) -> dict:
    """Scenes, once; pretrained LLMs, once each. -> what a run must know of the data."""
    from tools.study.small_llm import captions, pretrain

    summary_file = folder / "data" / "summary.json"
    if not summary_file.exists():
        summary = build_scenes(
            folder / "data",
            num_train=scale.num_train,
            num_heldout=scale.num_heldout,
            num_emoji=scale.num_emoji,
            difficulty=scale.difficulty,
        )
        summary_file.write_text(json.dumps(summary, indent=1) + "\n")
    data = json.loads(summary_file.read_text())
    missing = [name for name in sorted(llms) if not (folder / "llms" / name / "config.json").exists()]
    texts = captions(data["emoji"], scale.difficulty, seed=99) if missing else []
    tasks = [
        (name, pretrain, (scale.llms[name], texts, data["tokenizer"], folder / "llms" / name, scale.llm_steps))
        for name in missing
    ]
    failed = run_jobs(tasks, folder / "llms", jobs)
    if failed:
        raise SystemExit(f"pretraining of {', '.join(failed)} failed; see {folder / 'llms'}")
    return {
        **{name: data[name] for name in ("special_token_ids", "vocab_size", "tokenizer")},
        "train_index": str(folder / "data" / "train.index"),
        "heldout_index": str(folder / "data" / "heldout.index"),
    }


def run_jobs(tasks: list[Job], folder: Path, at_once: int) -> list[str]:
    """Each job in a process of its own that has everything imported. -> the names of those that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    waiting, running, failed, done = list(tasks), {}, [], 0
    started = time.monotonic()
    while waiting or running:
        while waiting and len(running) < at_once:
            name, function, arguments = waiting.pop(0)
            process: BaseProcess = context.Process(target=with_log, args=(folder / name, function, arguments))
            process.start()
            running[name] = process
        time.sleep(0.1)
        for name in [name for name, process in running.items() if not process.is_alive()]:
            done += 1
            if running.pop(name).exitcode:
                failed.append(name)
            minutes = (time.monotonic() - started) / 60
            console.print(f"{done}/{len(tasks)}  {name}  {minutes:.1f} min")
    return failed


def with_log(folder: Path, function: Callable[..., None], arguments: tuple) -> None:
    """The life of a job's process: its words go to ``log.txt`` beside its folder's other files."""
    import os

    import torch

    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log.txt").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    function(*arguments)


if __name__ == "__main__":
    sys.exit(main())
