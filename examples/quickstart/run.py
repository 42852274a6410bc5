"""The whole way once, on two CPU ranks: scenes, training with a stop in the middle, export, captions, a report.

    .venv/bin/python examples/quickstart/run.py

Everything lands in ``runs/quickstart``. Each step is the command that a user would give; ``caption.py`` and
``report.py`` beside this file caption the held-out scenes and draw the pictures.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.commands import check, console, navil, navil_command, run
from examples.quickstart.report import last_record, read_metrics, show_summary
from examples.quickstart.scenes import build_scenes

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "config.toml"


def main() -> int:
    """Runs every step; the first that fails ends it with that step's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="where everything goes")
    parser.add_argument("--num-train", type=int, default=16_000, help="training scenes")
    parser.add_argument("--num-heldout", type=int, default=400, help="held-out scenes")
    parser.add_argument("--num-emoji", type=int, default=20, help="different emoji")
    parser.add_argument(
        "--difficulty", type=int, default=1, help="1: two to a scene; 2: also three; 3: sizes; 4: counts"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps; default: what config.toml says")
    options = parser.parse_args()
    started = time.perf_counter()
    folder: Path = options.folder
    if folder.exists():
        shutil.rmtree(folder)

    console.rule("1  image-text shards from OpenMoji")
    scenes = build(folder, options)
    console.print(f"{scenes['num_train']} scenes to train on, {scenes['num_heldout']} held out")
    console.print(f"[dim]{scenes['attribution']}[/dim]")

    overrides = run_overrides(folder, scenes, options.steps)
    console.rule("2  training on two ranks, tensor and sequence parallel, stopped halfway")
    training_started = time.perf_counter()
    stopped_at = train_and_stop(folder, overrides)
    console.rule(f"3  resumed from the checkpoint of step {stopped_at}")
    train(overrides)
    train_seconds = time.perf_counter() - training_started

    console.rule("4  export to Hugging Face format")
    navil("convert", "to-hf", str(folder / "checkpoints"), str(folder / "hf"))
    console.rule("5  captions of held-out scenes, by transformers in a new process")
    run([sys.executable, str(HERE / "caption.py"), str(folder / "hf"), str(folder / "data"), str(folder)])

    console.rule("6  what came out")
    summary = summarize(folder, scenes, stopped_at, train_seconds, time.perf_counter() - started)
    show_summary(folder, summary, console)
    return 0


def build(folder: Path, options: argparse.Namespace) -> dict:
    """Step 1, with a progress bar."""
    with Progress(console=console) as progress:
        task = progress.add_task("scenes")
        return build_scenes(
            folder / "data",
            num_train=options.num_train,
            num_heldout=options.num_heldout,
            num_emoji=options.num_emoji,
            difficulty=options.difficulty,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def run_overrides(folder: Path, scenes: dict, steps: int | None) -> list[str]:
    """What of ``config.toml`` depends on the folder and on the scenes."""
    overrides = [
        f'data.train_sources=[{{index="{folder}/data/train.index"}}]',
        f'evaluation.sources=["{folder}/data/heldout.index"]',
        f'data.tokenizer="{folder}/data/tokenizer"',
        f'checkpoint.directory="{folder}/checkpoints"',
        f'logging.directory="{folder}/logs"',
        f"model.language.vocab_size={scenes['vocab_size']}",
        f"model.special_token_ids={scenes['special_token_ids']}",
    ]
    if steps is None:
        return overrides
    # The warm-up keeps its share of a run of another length.
    return [*overrides, f"training.train_steps={steps}", f"optimizer.warmup_steps={max(1, steps // 15)}"]


def train_and_stop(folder: Path, overrides: list[str]) -> int:
    """Starts training, asks it to stop (SIGTERM) past the middle, and gives the step that it saved."""
    process = subprocess.Popen(navil_command("train", str(CONFIG), *overrides, "--nproc", "2"))
    metrics = folder / "logs" / "metrics.jsonl"
    middle = None
    while process.poll() is None:
        time.sleep(0.2)
        record = last_record(metrics, "train")
        if record is not None:
            middle = middle or record["train_steps"] // 2
            if record["step"] >= middle:
                process.send_signal(signal.SIGTERM)
                break
    check(process.wait(), "train")
    return int(last_record(metrics, "train")["step"])


def train(overrides: list[str]) -> None:
    """Starts training again: it goes on from its newest checkpoint to the end."""
    navil("train", str(CONFIG), *overrides, "--nproc", "2")


def summarize(folder: Path, scenes: dict, stopped_at: int, train_seconds: float, total_seconds: float) -> dict:
    """The figures of the run, also written to ``summary.json``."""
    records = read_metrics(folder / "logs" / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "train"]
    evaluation = [record for record in records if record["kind"] == "evaluation"][-1]
    captions = json.loads((folder / "captions.json").read_text())
    summary = {
        "loss": steps[-1]["loss"],
        "heldout_loss": evaluation["loss"],
        "heldout_loss_swapped": evaluation["loss_swapped_images"],
        "exact_match": captions["exact_match"],
        "exact_match_swapped": captions["exact_match_swapped"],
        "tokens_per_second": sum(r["tokens"] for r in steps) / sum(r["step_seconds"] for r in steps),
        "samples_per_second": sum(r["samples"] for r in steps) / sum(r["step_seconds"] for r in steps),
        "data_wait_share": sum(r["data_wait_seconds"] for r in steps) / sum(r["step_seconds"] for r in steps),
        "padding_share": sum(r["padding_share"] for r in steps) / len(steps),
        "train_steps": steps[-1]["step"],
        "resumed_at_step": stopped_at,
        "train_samples": steps[-1]["consumed_samples"],
        "heldout_samples": captions["num_samples"],
        "parameters": captions["num_parameters"],
        "caption_seconds": captions["seconds"],
        "train_seconds": train_seconds,
        "total_seconds": total_seconds,
        "attribution": scenes["attribution"],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    sys.exit(main())
