"""The paper's three phases whole, at a size for two CPU cores: a real LLM learns to see emoji scenes.

    make recipe-small          # or: .venv/bin/python examples/recipe_small/run.py

Everything lands in ``runs/recipe_small``; each step is the command that a user would give. Stop it and start it again:
what is finished is not done again, and the phase at hand goes on from its checkpoint.
"""

import argparse
import json
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# Before torch loads: a thread that waits for another one leaves its core to whoever else uses this machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from examples.commands import check, console, navil, navil_here
from examples.quickstart.report import last_record, read_metrics
from examples.recipe_small.build_data import write_data
from examples.recipe_small.scores import captions_only, score_by_kind
from examples.recipe_small.smollm2 import write_smollm2
from examples.recipe_small.summary import show_summary
from examples.recipe_small.text_ability import measure_text_ability
from navil_megatron.config.load import config_to_dict, load_config
from navil_megatron.files.atomic_folder import new_folder

HERE = Path(__file__).resolve().parent
PHASES = {"s1.1": "stage1_1", "s1.2": "stage1_2", "s2": "stage2"}
START = "start"
FOLDER = "runs/recipe_small"
"""The usual folder; the configs name it from where they lie."""
MANIFESTS = (
    "train_captions",
    "train_text",
    "train_questions",
    "heldout_captions",
    "heldout_text",
    "heldout_questions",
)
LARGEST_PERPLEXITY = 1.25
"""Perplexity of held-out text against the start's: 0.22 nats a token, room for a few steps on a small mixture."""
MAX_NEW_TOKENS = 24


def main() -> int:
    """Runs every step that is not done; the first that fails ends it with that step's exit code."""
    options = parse_options()
    folder: Path = options.folder
    remember_options(folder, options)
    seconds = Stopwatch(folder / "seconds.json")

    console.rule("1  a pretrained LLM becomes a NaViL")
    llm = options.llm or folder / "llm"
    if options.llm is None:
        seconds.once("llm", llm, partial(write_llm, llm))
    seconds.once("start", folder / "weights", lambda: convert_llm(llm, folder))
    console.rule("2  scenes, questions and text")
    made = build_data(folder, options, seconds)
    console.print(
        f"{made['num_train']} scenes to train on, {made['num_heldout']} held out; text: {made['text_source']}"
    )
    console.print(f"[dim]{made['attribution']}[/dim]")

    console.rule("3  what the LLM can do before")
    export(folder, START, folder / "weights", seconds)
    text_ability(folder, START, seconds, llm)
    for number, phase in enumerate(PHASES):
        console.rule(f"{number + 4}  phase {phase}")
        if not (folder / phase / "hf").exists():
            seconds.time(f"train {phase}", partial(train, folder, phase, options))
        export(folder, phase, folder / phase / "checkpoints", seconds)
        text_ability(folder, phase, seconds)
        check_text_ability(folder, phase)
        seconds.time(f"answers {phase}", partial(answer, folder, phase))
    console.rule(f"{len(PHASES) + 4}  what came out")
    show_summary(folder, summarize(folder, made, seconds), console)
    return 0


def write_llm(folder: Path) -> None:
    """The LLM to start from, as a Hugging Face folder."""
    with new_folder(folder) as unfinished:
        write_smollm2(unfinished)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(FOLDER), help="where everything goes")
    parser.add_argument("--llm", type=Path, help="a Hugging Face folder to start from; default: SmolLM2-135M-Instruct")
    parser.add_argument("--num-train", type=int, default=6_000, help="training scenes")
    parser.add_argument("--num-heldout", type=int, default=48, help="held-out scenes")
    parser.add_argument("--num-emoji", type=int, default=6, help="different emoji")
    parser.add_argument(
        "--steps", type=int, nargs=len(PHASES), metavar="N", help="steps of the phases; default: what the configs say"
    )
    parser.add_argument("--fresh", action="store_true", help="delete the folder first")
    return parser.parse_args()


def remember_options(folder: Path, options: argparse.Namespace) -> None:
    """Notes the options, and refuses to go on with others: half of the folder would be of another run."""
    if options.fresh and folder.exists():
        shutil.rmtree(folder)
    noted = folder / "options.json"
    wanted = {name: str(value) for name, value in vars(options).items() if name not in ("fresh", "folder")}
    if noted.is_file():
        found = json.loads(noted.read_text())
        if found != wanted:
            differing = ", ".join(f"{name} {found.get(name)}" for name in wanted if found.get(name) != wanted[name])
            sys.exit(
                f"error: {folder} holds a run with {differing}; give the same options, another --folder or --fresh"
            )
    folder.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(wanted) + "\n")


class Stopwatch:
    """Seconds of each step, summed over all starts."""

    def __init__(self, path: Path) -> None:
        """Reads what earlier starts took."""
        self._path = path
        self.of: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def time(self, name: str, step: Callable[[], Any]) -> None:
        """Runs a step; its time counts even if it is stopped."""
        started = time.perf_counter()
        try:
            step()
        finally:
            self.of[name] = self.of.get(name, 0.0) + time.perf_counter() - started
            self._path.write_text(json.dumps(self.of, indent=1) + "\n")

    def once(self, name: str, result: Path, step: Callable[[], Any]) -> None:
        """Runs a step unless what it leaves last is there."""
        if not result.exists():
            self.time(name, step)


def convert_llm(llm: Path, folder: Path) -> None:
    """The LLM, with the encoder of the first phase's config, as a checkpoint."""
    config = tomllib.loads((HERE / "stage1_1.toml").read_text())
    vision = [f"model.vision.{name}={value}" for name, value in config["model"]["vision"].items()]
    words = [str(llm), str(folder / "weights"), *vision, f"training.seed={config['training']['seed']}"]
    navil_here("convert", "from-hf", *words, "--dtype", "bfloat16")


def build_data(folder: Path, options: argparse.Namespace, seconds: Stopwatch) -> dict[str, Any]:
    """Manifests and pictures, then shards; gives what they hold."""
    data, made = folder / "data", folder / "data" / "made.json"

    def write() -> None:
        with Progress(console=console) as progress:
            task = progress.add_task("scenes")
            summary = write_data(
                data,
                options.num_train,
                options.num_heldout,
                options.num_emoji,
                seed=0,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        made.write_text(json.dumps(summary, indent=1) + "\n")

    seconds.once("scenes", made, write)
    shards, tokenizer = folder / "shards", str(folder / "weights" / "tokenizer")
    for name in MANIFESTS:
        words = ["data", "build", str(data / f"{name}.jsonl"), str(shards), "--prefix", name, "--tokenizer", tokenizer]
        seconds.once("shards", shards / f"{name}.index", partial(navil_here, *words))
    captions_only(data / "heldout.jsonl", data / "captions.jsonl")
    return json.loads(made.read_text())


def train(folder: Path, phase: str, options: argparse.Namespace) -> None:
    """A phase to its end; a stopped one goes on from its newest checkpoint."""
    config = folder / phase / "config.toml"
    config.parent.mkdir(exist_ok=True)
    config.write_text((HERE / f"{PHASES[phase]}.toml").read_text().replace(f"../../{FOLDER}", str(folder.absolute())))
    navil("train", str(config), *overrides(folder, config, phase, options))
    record = last_record(folder / phase / "logs" / "metrics.jsonl", "train")
    check(int(record is None or record["step"] < record["train_steps"]), f"phase {phase}")


def overrides(folder: Path, config: Path, phase: str, options: argparse.Namespace) -> list[str]:
    """What differs from a phase's config: the sizes of another LLM, and other numbers of steps."""
    wanted = dict(settings(config_to_dict(load_config(config))["model"]))
    found = settings(tomllib.loads((folder / "weights" / "model.toml").read_text())["model"])
    changed = [f"{name}={json.dumps(value)}" for name, value in found if value != wanted[name]]
    if options.steps is None:
        return changed
    steps = options.steps[list(PHASES).index(phase)]
    # The warm-up keeps its share of a run of another length.
    return [*changed, f"training.train_steps={steps}", f"optimizer.warmup_steps={max(1, steps // 15)}"]


def settings(table: dict[str, Any], name: str = "model") -> Iterator[tuple[str, Any]]:
    """A table's settings by their whole names, as TOML has them."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from settings(value, f"{name}.{key}")
        else:
            yield f"{name}.{key}", "none" if value is None else list(value) if isinstance(value, tuple) else value


def export(folder: Path, name: str, checkpoint: Path, seconds: Stopwatch) -> None:
    """The weights as a Hugging Face folder."""
    target = folder / name / "hf"
    target.parent.mkdir(exist_ok=True)
    seconds.once(f"export {name}", target, lambda: navil_here("convert", "to-hf", str(checkpoint), str(target)))


def text_ability(folder: Path, name: str, seconds: Stopwatch, llm: Path | None = None) -> None:
    """Perplexity and the hash of all logits, without an image."""
    output = folder / name / "text.json"
    data = folder / "data" / "heldout_text.jsonl"
    seconds.once(f"perplexity {name}", output, lambda: measure_text_ability(folder / name / "hf", data, output, llm))
    console.print(f"perplexity of held-out text: {read_json(output)['perplexity']:.3f}")


def check_text_ability(folder: Path, phase: str) -> None:
    """S1.1 trains nothing that text goes through; later phases may not ruin it."""
    before, now = read_json(folder / START / "text.json"), read_json(folder / phase / "text.json")
    if phase == "s1.1" and now["logits"] != before["logits"]:
        console.print("[red]s1.1 changed the logits of text: its text weights are not frozen[/red]")
        raise SystemExit(1)
    if now["perplexity"] > LARGEST_PERPLEXITY * before["perplexity"]:
        console.print(
            f"[red]perplexity went from {before['perplexity']:.2f} to {now['perplexity']:.2f}, more than "
            f"{LARGEST_PERPLEXITY} times: {phase} ruined the text ability[/red]"
        )
        raise SystemExit(1)


def answer(folder: Path, phase: str) -> None:
    """Captions after every phase; after the last all questions too, and everything with the pictures swapped."""
    for name in ("heldout", "swapped") if phase == "s2" else ("captions",):
        words = [str(folder / phase / "hf"), str(folder / "data" / f"{name}.jsonl"), "--batch-size", "32"]
        output = folder / phase / name
        navil_here("evaluate", *words, "--output", str(output), "--max-new-tokens", str(MAX_NEW_TOKENS))


def summarize(folder: Path, made: dict[str, Any], seconds: Stopwatch) -> dict[str, Any]:
    """The figures of the run, also written to ``summary.json``."""
    phases = {}
    for phase in PHASES:
        records = read_metrics(folder / phase / "logs" / "metrics.jsonl")
        steps = [record for record in records if record["kind"] == "train"]
        evaluated = [record for record in records if record["kind"] == "evaluation"]
        phases[phase] = {
            "train_steps": steps[-1]["step"],
            "samples": steps[-1]["consumed_samples"],
            "tokens": steps[-1]["consumed_tokens"],
            "first_loss": steps[0]["loss"],
            "loss": steps[-1]["loss"],
            "heldout": {key: value for key, value in evaluated[-1].items() if key.startswith("loss")},
            "perplexity": read_json(folder / phase / "text.json")["perplexity"],
            "tokens_per_second": sum(r["tokens"] for r in steps) / sum(r["step_seconds"] for r in steps),
        }
    data = folder / "data"
    start = read_json(folder / START / "text.json")
    summary = {
        "perplexity_of_the_llm": start["perplexity_of_the_llm"],
        "perplexity_at_the_start": start["perplexity"],
        "largest_difference_to_transformers": start["largest_difference"],
        "logits_unchanged_by_s1.1": read_json(folder / "s1.1" / "text.json")["logits"] == start["logits"],
        "phases": phases,
        "captions": {
            phase: score_by_kind(data / "captions.jsonl", folder / phase / "captions")["caption"]
            for phase in ("s1.1", "s1.2")
        },
        "answers": score_by_kind(data / "heldout.jsonl", folder / "s2" / "heldout"),
        "answers_swapped": score_by_kind(data / "swapped.jsonl", folder / "s2" / "swapped"),
        "seconds": seconds.of,
        "total_seconds": sum(seconds.of.values()),
        **made,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    return json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
