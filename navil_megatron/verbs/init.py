"""``navil-megatron init``: from an LLM and an index to a config that runs as it is."""

from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from navil_megatron.planner.hardware import Hardware
from navil_megatron.scaling.sizes import model_size
from navil_megatron.verbs.arguments import choice, chosen, count, positive, value
from navil_megatron.verbs.verb import Extra, Outcome, verb

_AUTO = "auto"


def _encoder(text: str) -> float | None:
    """Parameters; ``None``: by the paper's rule."""
    try:
        return None if text == _AUTO else model_size(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{error}, or {_AUTO}") from None


@verb(
    "init",
    "write the config of a run that starts from an LLM: encoder by the paper's 1% rule, layout by plan",
    "navil-megatron init --llm Qwen3-8B/ --data shards/web.index --gpus 8 --output run.toml",
    value("--llm", "FOLDER", "Hugging Face folder of a language model", required=True),
    value("--encoder", "SIZE", "its parameters, as 600M; auto: by the rule (auto)", _encoder, default=None),
    value("--data", "INDEX", "what data build or data index wrote", nargs="+", required=True),
    value("--gpus", "N", "of the run", count, required=True),
    value("--hbm", "GB", f"memory of a GPU ({Hardware(gpus=1).hbm:g})", positive, default=Hardware(gpus=1).hbm),
    value("--steps", "N", "of the run (one pass over the data, or 100)", count),
    choice("--device", ("cuda", "cpu"), "where it runs (cuda)", default="cuda"),
    value("--weights", "FOLDER", "checkpoint of the LLM, made if it is not there (weights, beside the config)"),
    value("--tokenizer", "FOLDER", "instead of the one in the LLM's folder"),
    value("--output", "FILE", "the config to write (run.toml)", default=Path("run.toml")),
    counts="bytes",
    needs=Extra("study", ("scipy",)),
)
def init(options: Namespace) -> Outcome:
    """Chooses, converts, writes, and says what was chosen."""
    from navil_megatron.hf.memory import keep_freed_memory
    from navil_megatron.init_run import Wanted, describe_init, init_run

    keep_freed_memory()
    names = ("llm", "encoder", "data", "gpus", "hbm", "steps", "device", "tokenizer", "output")
    weights = options.weights or options.output.parent / "weights"
    report = init_run(Wanted(**chosen(options, *names), weights=weights), options.on_progress)
    return Outcome(report, describe_init(report, options.gpus))
