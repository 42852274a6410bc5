"""``navil-megatron convert``: to-hf, from-hf, upcycle, verify, inspect."""

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.verbs.arguments import DTYPE, JOBS, chosen, count, file_size, flag, value
from navil_megatron.verbs.verb import Outcome, verb

_TOKENIZER = value("--tokenizer", "FOLDER", "instead of the one that the source names")
_NO_VERIFY = flag("--no-verify", "do not read back and compare what was written")


@verb(
    "convert to-hf",
    "export a checkpoint as a folder that transformers loads",
    "navil-megatron convert to-hf runs/a/checkpoints exported/",
    value("checkpoint", "CHECKPOINT", "a step_... folder, or the folder of them"),
    value("folder", "FOLDER", "the Hugging Face folder to write"),
    value("--max-part-size", "SIZE", "largest safetensors file, as 5GB (5GB)", file_size, default="5GB"),
    _TOKENIZER,
    DTYPE,
    JOBS,
    _NO_VERIFY,
    counts="bytes",
)
def to_hf(options: Namespace) -> Outcome:
    """Exports a checkpoint and says what went out."""
    from navil_megatron.hf.export import convert_to_hf

    return _convert(convert_to_hf, options, "checkpoint", "folder", max_file_bytes=options.max_part_size)


@verb(
    "convert from-hf",
    "make a checkpoint whose weights start a run (checkpoint.initial_weights), of a NaViL folder or of a bare LLM",
    "navil-megatron convert from-hf downloaded/ weights/\n"
    "  navil-megatron convert from-hf Qwen3-8B/ weights/ --config run.toml model.language.visual_expert_init=copy",
    value("folder", "FOLDER", "a NaViL folder, ours or the authors', or an LLM"),
    value("checkpoint", "CHECKPOINT", "the checkpoint folder to write"),
    value("overrides", "section.field=value", "settings for an LLM, in TOML", str, nargs="*"),
    value("--config", "TOML", "for an LLM: [model.vision] and what else is set"),
    value("--seed", "N", "for an LLM: of what is drawn (training.seed)", int),
    _TOKENIZER,
    DTYPE,
    JOBS,
    _NO_VERIFY,
    counts="bytes",
)
def from_hf(options: Namespace) -> Outcome:
    """Reads a Hugging Face folder and says what came in."""
    from navil_megatron.hf.ingest import convert_from_hf
    from navil_megatron.hf.llm.ingest import convert_llm
    from navil_megatron.hf.model_source import kind_of

    kind = kind_of(options.folder)
    if kind == "checkpoint":
        raise UserError(f"{options.folder} is a checkpoint already; from-hf reads a Hugging Face folder")
    if kind == "LLM folder":
        return _convert(convert_llm, options, "folder", "checkpoint", **chosen(options, "config", "overrides", "seed"))
    if options.config or options.overrides or options.seed is not None:
        raise UserError(f"{options.folder} holds a whole NaViL; --config, --seed and settings are for a bare LLM")
    return _convert(convert_from_hf, options, "folder", "checkpoint")


@verb(
    "convert upcycle",
    "make several feed-forward experts per modality of one; the model computes what it did before",
    "navil-megatron convert upcycle runs/a/checkpoints wider/ --experts 4 --experts-per-token 2",
    value("source", "CHECKPOINT", "a step_... folder, or the folder of them"),
    value("checkpoint", "NEW", "the checkpoint folder to write"),
    value("--experts", "K", "experts of each modality", count, required=True),
    value("--experts-per-token", "N", "chosen by the router (1)", count, default=1),
    value("--seed", "N", "decides the routers' weights (1234)", int, default=1234),
    JOBS,
    _NO_VERIFY,
    counts="bytes",
)
def upcycle(options: Namespace) -> Outcome:
    """Multiplies the experts of a checkpoint."""
    from navil_megatron.hf.upcycle import convert_upcycle

    settings = chosen(options, "experts_per_token", "seed")
    return _convert(convert_upcycle, options, "source", "checkpoint", num_experts=options.experts, **settings)


@verb(
    "convert verify",
    "compare two models, each a checkpoint or a folder, bit for bit; exit status 1 if they differ or are not finite",
    "navil-megatron convert verify runs/a/checkpoints exported/",
    value("first", "A", "a checkpoint or a Hugging Face folder"),
    value("second", "B", "another one"),
    flag("--logits", "run both in float32 and compare them layer by layer too"),
    value("--image", "FILE", "to run them on", action="append", default=[]),
    value("--prompt", "TEXT", "follows each image, and alone", str, default="Describe the image."),
    value("--tokenizer", "FOLDER", "instead of the one that A or B names"),
    counts="bytes",
)
def verify(options: Namespace) -> Outcome:
    """Compares two models."""
    from navil_megatron.hf.compare import compare_weights, describe_weights
    from navil_megatron.hf.memory import keep_freed_memory

    keep_freed_memory()
    report = compare_weights(options.first, options.second, options.on_progress)
    equal, text = report["equal"], describe_weights(report)
    if options.logits:
        from navil_megatron.runtime.logs import quiet_known_warnings

        quiet_known_warnings()  # comes before the first import of megatron-core
        from navil_megatron.compare_outputs import compare_outputs, describe_outputs

        outputs = compare_outputs(options.first, options.second, options.prompt, options.image, options.tokenizer)
        report["outputs"] = outputs
        equal, text = equal and outputs["equal"], f"{text}\n{describe_outputs(outputs)}"
    return Outcome(report, text, 0 if equal and report["finite"] else 1)


@verb(
    "convert inspect",
    "tell what a checkpoint or a folder holds, by its headers",
    "navil-megatron convert inspect exported/",
    value("path", "PATH", "a checkpoint or a Hugging Face folder"),
)
def inspect(options: Namespace) -> Outcome:
    """Says what a path holds."""
    from navil_megatron.hf.inspect import describe_contents, inspect

    report = inspect(options.path)
    return Outcome(report, describe_contents(report))


def _convert(
    conversion: Callable[..., dict[str, Any]], options: Namespace, source: str, target: str, **settings: Any
) -> Outcome:
    """What all conversions share: how the process keeps its memory, what each is told, and what each tells.

    ``source`` and ``target`` name the options, and entries of the report, of the folders to read and to write;
    ``settings`` are what only this conversion is told.
    """
    import torch

    from navil_megatron.hf.memory import keep_freed_memory

    keep_freed_memory()
    verify = not options.no_verify
    settings |= {"verify": verify, "num_processes": options.jobs, "on_progress": options.on_progress}
    if "dtype" in options:
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        settings |= {"dtype": dtype, "tokenizer": options.tokenizer}
    started = time.monotonic()
    report = conversion(getattr(options, source), getattr(options, target), **settings)
    report |= {"verified": verify, "seconds": round(time.monotonic() - started, 3)}
    lines = [
        f"{report[source]} -> {report[target]}",
        f"{report['num_parameters']} parameters in {report['num_hf_tensors']} Hugging Face tensors, "
        f"{report['num_bytes']} bytes, {', '.join(report['types'])}, {report['seconds']} s",
        "verified: read back and compared" if verify else "not verified",
        *report["notes"],
    ]
    return Outcome(report, "\n".join(lines))


CONVERT_VERBS = (to_hf, from_hf, upcycle, verify, inspect)
