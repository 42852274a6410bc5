"""The ``navil-megatron convert`` verbs: their options, and the text of what they report.

Nothing heavy is imported until a verb runs, so that ``--help`` answers at once.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from navil_megatron.hf.memory import keep_freed_memory

Report = dict[str, Any]
Outcome = tuple[Report, str, int]
"""Report, its text for a terminal, and the exit status."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_convert_verbs(
    add_verb: Callable[..., argparse.ArgumentParser], compare_outputs: Callable[[argparse.Namespace], Outcome]
) -> None:
    """Adds the verbs; ``add_verb(name, run, what, example)`` makes the parser of one.

    The run function of a verb takes its options and a function to tell the bytes that are done, and gives an
    ``Outcome``. ``compare_outputs`` runs both models of ``verify --logits``, which takes more than this folder.
    """
    to_hf = add_verb(
        "to-hf",
        run_to_hf,
        "export a checkpoint as a folder that transformers loads",
        "navil-megatron convert to-hf runs/a/checkpoints exported/",
    )
    to_hf.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_... folder, or the folder of them")
    to_hf.add_argument("folder", type=Path, metavar="FOLDER", help="the Hugging Face folder to write")
    to_hf.add_argument(
        "--max-part-size", type=file_size, default="5GB", metavar="SIZE", help="largest safetensors file, as 5GB (5GB)"
    )
    from_hf = add_verb(
        "from-hf",
        run_from_hf,
        "make a checkpoint whose weights start a run (checkpoint.initial_weights), of a NaViL folder or of a bare LLM",
        "navil-megatron convert from-hf downloaded/ weights/\n"
        "  navil-megatron convert from-hf Qwen3-8B/ weights/ --config run.toml model.language.visual_expert_init=copy",
    )
    from_hf.add_argument("folder", type=Path, metavar="FOLDER", help="a NaViL folder, ours or the authors', or an LLM")
    from_hf.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the checkpoint folder to write")
    from_hf.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings for an LLM, in TOML")
    from_hf.add_argument("--config", type=Path, metavar="TOML", help="for an LLM: [model.vision] and what else is set")
    from_hf.add_argument("--seed", type=int, metavar="N", help="for an LLM: of what is drawn (training.seed)")
    upcycle = add_verb(
        "upcycle",
        run_upcycle,
        "make several feed-forward experts per modality of one; the model computes what it did before",
        "navil-megatron convert upcycle runs/a/checkpoints wider/ --experts 4 --experts-per-token 2",
    )
    upcycle.add_argument("source", type=Path, metavar="CHECKPOINT", help="a step_... folder, or the folder of them")
    upcycle.add_argument("checkpoint", type=Path, metavar="NEW", help="the checkpoint folder to write")
    upcycle.add_argument("--experts", type=_count, required=True, metavar="K", help="experts of each modality")
    upcycle.add_argument("--experts-per-token", type=_count, default=1, metavar="N", help="chosen by the router (1)")
    upcycle.add_argument("--seed", type=int, default=1234, metavar="N", help="decides the routers' weights (1234)")
    for parser in (to_hf, from_hf):
        parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="instead of the one that the source names")
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of the weights (as stored)")
    for parser in (to_hf, from_hf, upcycle):
        parser.add_argument("--jobs", type=_count, default=1, metavar="N", help="processes that share the work (1)")
        parser.add_argument("--no-verify", action="store_true", help="do not read back and compare what was written")
    verify = add_verb(
        "verify",
        run_verify,
        "compare two models, each a checkpoint or a folder, bit for bit; exit status 1 if they differ",
        "navil-megatron convert verify runs/a/checkpoints exported/",
    )
    verify.add_argument("first", type=Path, metavar="A", help="a checkpoint or a Hugging Face folder")
    verify.add_argument("second", type=Path, metavar="B", help="another one")
    verify.add_argument("--logits", action="store_true", help="run both in float32 and compare them layer by layer too")
    verify.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="to run them on")
    verify.add_argument("--prompt", default="Describe the image.", metavar="TEXT", help="follows each image, and alone")
    verify.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="instead of the one that A or B names")
    verify.set_defaults(compare_outputs=compare_outputs)
    inspect = add_verb(
        "inspect",
        run_inspect,
        "tell what a checkpoint or a folder holds, by its headers",
        "navil-megatron convert inspect exported/",
    )
    inspect.add_argument("path", type=Path, metavar="PATH", help="a checkpoint or a Hugging Face folder")


def run_to_hf(options: argparse.Namespace, on_progress: Callable[[int, int], None]) -> Outcome:
    """Exports a checkpoint and says what went out."""
    from navil_megatron.hf.export import convert_to_hf

    keep_freed_memory()
    report = convert_to_hf(
        options.checkpoint,
        options.folder,
        tokenizer=options.tokenizer,
        dtype=_weight_type(options.dtype),
        max_part_bytes=options.max_part_size,
        verify=not options.no_verify,
        jobs=options.jobs,
        on_progress=on_progress,
    )
    return report, _describe(report, report["checkpoint"], report["folder"]), 0


def run_from_hf(options: argparse.Namespace, on_progress: Callable[[int, int], None]) -> Outcome:
    """Reads a Hugging Face folder and says what came in."""
    from navil_megatron.config.errors import UserError
    from navil_megatron.hf.ingest import convert_from_hf
    from navil_megatron.hf.llm.ingest import convert_llm
    from navil_megatron.hf.model_source import kind_of

    keep_freed_memory()
    common: dict[str, Any] = {
        "tokenizer": options.tokenizer,
        "dtype": _weight_type(options.dtype),
        "verify": not options.no_verify,
        "jobs": options.jobs,
        "on_progress": on_progress,
    }
    overrides = [*options.overrides, *options.rest]
    kind = kind_of(options.folder)
    if kind == "checkpoint":
        raise UserError(f"{options.folder} is a checkpoint already; from-hf reads a Hugging Face folder")
    if kind == "LLM folder":
        report = convert_llm(options.folder, options.checkpoint, options.config, overrides, seed=options.seed, **common)
    elif options.config or overrides or options.seed is not None:
        raise UserError(f"{options.folder} holds a whole NaViL; --config, --seed and settings are for a bare LLM")
    else:
        report = convert_from_hf(options.folder, options.checkpoint, **common)
    return report, _describe(report, report["folder"], report["checkpoint"]), 0


def run_upcycle(options: argparse.Namespace, on_progress: Callable[[int, int], None]) -> Outcome:
    """Multiplies the experts of a checkpoint."""
    from navil_megatron.hf.upcycle import convert_upcycle

    report = convert_upcycle(
        options.source,
        options.checkpoint,
        num_experts=options.experts,
        experts_per_token=options.experts_per_token,
        seed=options.seed,
        verify=not options.no_verify,
        jobs=options.jobs,
        on_progress=on_progress,
    )
    return report, _describe(report, report["source"], report["checkpoint"]), 0


def run_verify(options: argparse.Namespace, on_progress: Callable[[int, int], None]) -> Outcome:
    """Compares two models."""
    from navil_megatron.hf.compare import compare, describe_comparison

    keep_freed_memory()
    report = compare(options.first, options.second, on_progress)
    text, status = describe_comparison(report), 0 if report["equal"] else 1
    if options.logits:
        report["outputs"], outputs_text, outputs_status = options.compare_outputs(options)
        text, status = f"{text}\n{outputs_text}", max(status, outputs_status)
    return report, text, status


def run_inspect(options: argparse.Namespace, on_progress: Callable[[int, int], None]) -> Outcome:
    """Says what a path holds."""
    from navil_megatron.hf.inspect import describe_contents, inspect

    report = inspect(options.path)
    return report, describe_contents(report), 0


def file_size(text: str) -> int:
    """Bytes of a size as transformers writes it, e.g. ``5GB`` or ``300MB``, for argparse."""
    match = re.fullmatch(r"(\d{1,12}) ?([KMGT]i?B)", text, re.IGNORECASE)
    unit = match and _UNITS.get(match[2].upper())
    if match is None or not unit or int(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size as 5GB, 300MB or 2GiB")
    return int(match[1]) * unit


def _describe(report: Report, source: str, target: str) -> str:
    """The report of a conversion for a terminal."""
    checked = "verified: read back and compared" if report["verified"] else "not verified"
    lines = [
        f"{source} -> {target}",
        f"{report['num_parameters']} parameters in {report['num_hf_tensors']} Hugging Face tensors, "
        f"{report['num_bytes']} bytes, {', '.join(report['types'])}, {report['seconds']} s",
        checked,
    ]
    return "\n".join([*lines, *report["notes"]])


def _weight_type(name: str | None) -> Any:
    """The torch type of that name; ``None`` keeps what is stored."""
    import torch

    return None if name is None else getattr(torch, name)


def _count(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected at least 1")
    return number
