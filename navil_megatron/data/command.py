"""The ``navil-megatron data`` verbs: their options, and the text of what they report.

Nothing heavy is imported until a verb runs, so that ``--help`` answers at once.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError

Report = dict[str, Any]
Outcome = tuple[Report, str, int]
"""Report, its text for a terminal, and the exit status."""
OnProgress = Callable[[int, int], None]


def add_data_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verbs; ``add_verb(name, run, what, example)`` makes the parser of one.

    The run function of a verb takes its options and a function to tell the shards that are done, and gives an
    ``Outcome``.
    """
    _add_build(add_verb)
    _add_index(add_verb)
    _add_inspect(add_verb)
    _add_show(add_verb)


def _add_build(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_verb(
        "build",
        run_build,
        "write tar shards and their index from images and captions, conversations or text; run again, it goes on",
        "navil-megatron data build images.jsonl shards/ --tokenizer tokenizer/ --jobs 8",
    )
    parser.add_argument(
        "manifest",
        type=Path,
        metavar="MANIFEST",
        help='JSON lines of {"image": path or list, "caption": text}, or with "conversations", "messages" or "text"; '
        "or parquet",
    )
    parser.add_argument("output", type=Path, metavar="FOLDER", help="where the shards and PREFIX.index go")
    parser.add_argument("--prefix", default="shard", help="start of the shards' names (shard)")
    parser.add_argument("--samples-per-shard", type=_count, default=10_000, metavar="N", help="lines a shard (10000)")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of parquet (text)")
    _add_common(parser)


def _add_index(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_verb(
        "index",
        run_index,
        "make one index over WebDataset tars that exist already; run again, it goes on",
        "navil-megatron data index 'shards/*.tar' --output shards/web.index --tokenizer tokenizer/ --jobs 8",
    )
    parser.add_argument("shards", nargs="+", metavar="TAR", help="paths, glob patterns, or URLs that fsspec opens")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the index to write, as web.index")
    parser.add_argument(
        "--headers-only", action="store_true", help="do not decode the images: faster, finds less damage"
    )
    _add_common(parser)


def _add_inspect(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_verb(
        "inspect",
        run_inspect,
        "tell what an index holds: samples, images, tokens, sizes, shards",
        "navil-megatron data inspect shards/web.index --check",
    )
    parser.add_argument("index", type=Path, metavar="INDEX", help="what data build or data index wrote")
    parser.add_argument("--check", action="store_true", help="look whether every shard is there with the right size")


def _add_show(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_verb(
        "show",
        run_show,
        "show rows of a step as a run will see them: tokens, images, texts, loss weights, padding",
        "navil-megatron data show run.toml --step 100 --rows 2 --output rows.html",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change, in TOML")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="which step, from 0 (0)")
    parser.add_argument("--first-row", type=int, default=0, metavar="N", help="of the global batch, from 0 (0)")
    parser.add_argument("--rows", type=_count, default=2, metavar="N", help="how many rows (2)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page to write, as rows.html")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FOLDER", help="the run's tokenizer; its tokens are counted"
    )
    parser.add_argument("--jobs", type=_count, default=1, metavar="N", help="processes that share the work (1)")


def run_build(options: argparse.Namespace, on_progress: OnProgress) -> Outcome:
    """Writes shards and says what was left out."""
    from navil_megatron.data.shards.build_shards import build_shards
    from navil_megatron.data.shards.index_report import describe_index_report
    from navil_megatron.data.tokenizer import load_tokenizer

    report = build_shards(
        options.manifest,
        options.output,
        load_tokenizer(options.tokenizer),
        prefix=options.prefix,
        samples_per_shard=options.samples_per_shard,
        text_column=options.text_column,
        jobs=options.jobs,
        on_progress=on_progress,
    )
    return report, describe_index_report(report), 0


def run_index(options: argparse.Namespace, on_progress: OnProgress) -> Outcome:
    """Indexes shards and says what was left out."""
    from navil_megatron.data.shards.index_report import describe_index_report
    from navil_megatron.data.shards.index_shards import index_shards
    from navil_megatron.data.tokenizer import load_tokenizer

    report = index_shards(
        options.shards,
        options.output,
        load_tokenizer(options.tokenizer),
        decode=not options.headers_only,
        jobs=options.jobs,
        on_progress=on_progress,
    )
    return report, describe_index_report(report), 0


def run_inspect(options: argparse.Namespace, on_progress: OnProgress) -> Outcome:
    """Says what an index holds."""
    from navil_megatron.data.shards.index_report import describe_index_report, report_index
    from navil_megatron.data.shards.source import Source

    report = report_index(options.index)
    if options.check:
        Source(options.index).check_shards(urls=True)
    return report, describe_index_report(report), 0


def run_show(options: argparse.Namespace, on_progress: OnProgress) -> Outcome:
    """Shows rows."""
    from navil_megatron.config.load import load_config
    from navil_megatron.config.validate import validate
    from navil_megatron.data.show.step import show_step

    config = load_config(options.config, [*options.overrides, *options.rest])
    validate(config)
    if options.step < 0 or options.first_row < 0:
        raise UserError(f"--step {options.step} --first-row {options.first_row}: expected numbers from 0")
    report = show_step(config, options.step, options.first_row, options.rows, options.output)
    text = f"{options.output}: {report['rows']} rows with {report['samples']} samples, {report['fill']:.1%} full"
    return report | {"output": str(options.output)}, text, 0


def _count(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected at least 1")
    return number
