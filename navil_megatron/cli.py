"""The ``navil-megatron`` command: train, plan, data, convert, scaling, generate, evaluate, attention, doctor.

Each verb imports what it needs when it runs, so that ``--help`` and ``doctor`` answer at once and on a broken install.
What a user can mend is printed as ``error: ...`` lines and exits with code 2; ``--json`` prints one JSON object, last
on stdout.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from navil_megatron import __version__
from navil_megatron.config.errors import EXIT_CODE, UserError, describe
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.command import add_data_verbs
from navil_megatron.evaluation.attention_command import add_attention_verb
from navil_megatron.evaluation.command import add_evaluate_verb
from navil_megatron.hf.command import add_convert_verbs
from navil_megatron.planner.command import add_plan_verb
from navil_megatron.scaling.command import add_scaling_verbs

Report = dict[str, Any]
OnProgress = Callable[[int, int], None]
Verb = Callable[[argparse.Namespace], int]
RunVerb = Callable[[argparse.Namespace, OnProgress], tuple[Report, str, int]]
_PLACEHOLDER = "<image>"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and gives the exit code."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse closes a list of positionals at the first option, so overrides that follow one come back here.
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        status: int = options.verb(options)
    except UserError as error:
        print(describe(error), file=sys.stderr)
        return EXIT_CODE
    except OSError as error:
        # The machine's fault, not the user's: a full or failing disk, a folder that may not be written.
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def build_parser() -> argparse.ArgumentParser:
    """Every verb with its options, help and example."""
    parser = argparse.ArgumentParser(prog="navil-megatron", description="Pretrains NaViL on megatron-core.")
    parser.add_argument("--version", action="version", version=f"navil-megatron {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_train(verbs)
    _add_plan(verbs)
    _add_data(_add_group(verbs, "data", "make what a run reads"))
    _add_convert(_add_group(verbs, "convert", "between sharded checkpoints and Hugging Face folders"))
    _add_scaling(_add_group(verbs, "scaling", "how large the visual encoder should be, from a study's results"))
    _add_generate(verbs)
    _add_evaluate(verbs)
    _add_attention(verbs)
    _add_doctor(verbs)
    return parser


def _add_verb(
    verbs: Any, name: str, verb: Verb, what: str, example: str, reports: bool = True
) -> argparse.ArgumentParser:
    """A verb whose help ends in an example; ``--json`` where it reports something."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=verb)
    if reports:
        parser.add_argument("--json", action="store_true", help="print the report as one JSON object, last on stdout")
    return parser


def _add_group(verbs: Any, name: str, what: str) -> Any:
    """A verb that has verbs of its own."""
    parser = verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    return parser.add_subparsers(required=True, metavar="VERB")


def _add_train(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "train",
        run_train,
        "train on this machine, resuming from the newest checkpoint",
        "navil-megatron train run.toml training.train_steps=100 --nproc 2\n\n"
        "on a cluster:\n"
        "  torchrun --nnodes 4 --nproc-per-node 8 ... -m navil_megatron.pretrain run.toml",
        reports=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change, in TOML")
    parser.add_argument("--nproc", type=_count, default=1, metavar="N", help="ranks to start on this machine (1)")
    parser.add_argument("--dry-run", action="store_true", help="check and build everything without a GPU, and stop")
    parser.add_argument("--gpus", type=_count, metavar="N", help="of the dry run (the fewest that hold the layout)")


def _add_plan(verbs: Any) -> None:
    def add_verb(name: str, run: Callable[..., Any], what: str, example: str) -> argparse.ArgumentParser:
        return _add_verb(verbs, name, partial(_show, run), what, example)

    add_plan_verb(add_verb)


def _add_data(verbs: Any) -> None:
    def add_verb(name: str, run: RunVerb, what: str, example: str) -> argparse.ArgumentParser:
        return _add_verb(verbs, name, _with_bar(run, partial(_count_bar, name, "shards")), what, example)

    add_data_verbs(add_verb)


def _add_convert(verbs: Any) -> None:
    def add_verb(name: str, run: RunVerb, what: str, example: str) -> argparse.ArgumentParser:
        return _add_verb(verbs, name, _with_bar(run, partial(_bytes_bar, name)), what, example)

    add_convert_verbs(add_verb, _compare_outputs)


def _add_scaling(verbs: Any) -> None:
    def add_verb(name: str, run: Callable[..., Any], what: str, example: str) -> argparse.ArgumentParser:
        return _add_verb(verbs, name, partial(_show, run), what, example)

    add_scaling_verbs(add_verb)


def _add_generate(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "generate",
        run_generate,
        "let an exported model answer a prompt about each image, by greedy decoding; runs the code in the folder",
        'navil-megatron generate exported/ cat.jpg dog.jpg --prompt "<image>Describe it."',
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what convert to-hf wrote; must be trusted")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="one answer is given for each")
    parser.add_argument("--prompt", default=_PLACEHOLDER, metavar="TEXT", help="<image> stands for the image (<image>)")
    parser.add_argument("--max-new-tokens", type=_count, default=256, metavar="N", help="longest answer (256)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (cpu)")


def _add_evaluate(verbs: Any) -> None:
    def add_verb(name: str, run: RunVerb, what: str, example: str) -> argparse.ArgumentParser:
        return _add_verb(verbs, name, _with_bar(run, partial(_count_bar, name, "samples")), what, example)

    add_evaluate_verb(add_verb)


def _add_attention(verbs: Any) -> None:
    def add_verb(name: str, run: Callable[..., Any], what: str, example: str) -> argparse.ArgumentParser:
        return _add_verb(verbs, name, partial(_show, run), what, example)

    add_attention_verb(add_verb)


def _add_doctor(verbs: Any) -> None:
    _add_verb(
        verbs,
        "doctor",
        run_doctor,
        "show versions and GPUs, what is missing or wrong, and the line that installs it",
        "navil-megatron doctor",
    )


def run_train(options: argparse.Namespace) -> int:
    """Starts the ranks; a config that cannot run is refused before any of them."""
    from navil_megatron.config.load import load_config
    from navil_megatron.config.validate import validate
    from navil_megatron.launch import run_ranks

    arguments = [str(options.config), *options.overrides, *options.rest]
    config = load_config(arguments[0], arguments[1:])
    if options.dry_run:
        return _dry_run(config, options.gpus)
    if options.gpus is not None:
        raise UserError("--gpus belongs to --dry-run; a run has the ranks that --nproc or torchrun starts")
    if "RANK" not in os.environ:
        validate(config, options.nproc)
        if options.nproc > 1:
            return run_ranks("navil_megatron.pretrain", arguments, options.nproc)
    # One rank, or a rank that torchrun started: this process becomes it, so that signals and the exit code are its own.
    os.execv(sys.executable, [sys.executable, "-m", "navil_megatron.pretrain", *arguments])


def _dry_run(config: NaViLConfig, gpus: int | None) -> int:
    from navil_megatron.runtime.logs import quiet_known_warnings

    quiet_known_warnings()  # comes before the first import of megatron-core
    from navil_megatron.dry_run import dry_run

    print(dry_run(config, gpus))
    return 0


def _compare_outputs(options: argparse.Namespace) -> tuple[Report, str, int]:
    """Runs both models of ``convert verify --logits``."""
    from navil_megatron.runtime.logs import quiet_known_warnings

    quiet_known_warnings()  # comes before the first import of megatron-core
    from navil_megatron.compare_outputs import compare_models, describe_outputs

    report = compare_models(options.first, options.second, options.prompt, options.image, options.tokenizer)
    return report, describe_outputs(report), 0 if report["equal"] else 1


def run_generate(options: argparse.Namespace) -> int:
    """Prints one answer for each image."""
    if options.prompt.count(_PLACEHOLDER) > 1:
        raise UserError(f"--prompt holds {_PLACEHOLDER} more than once; each answer is about one image")

    from navil_megatron.hf.generate import generate_captions, load_for_generation

    captioner = load_for_generation(options.folder, device=options.device)
    texts = generate_captions(captioner, options.images, options.prompt, options.max_new_tokens)
    answers = [{"image": str(image), "text": text} for image, text in zip(options.images, texts, strict=True)]
    report = {"folder": str(options.folder), "prompt": options.prompt, "answers": answers}
    several = len(texts) > 1
    return _tell(options, report, "\n".join(f"{a['image']}: {a['text']}" if several else a["text"] for a in answers))


def run_doctor(options: argparse.Namespace) -> int:
    """Prints the checks; 1 if something must be mended before a run."""
    from navil_megatron.doctor import as_json, as_table, diagnose

    checks = diagnose()
    _tell(options, as_json(checks), as_table(checks))
    return int(any(check.is_problem for check in checks))


def _with_bar(run: RunVerb, bar: Callable[[], AbstractContextManager[OnProgress]]) -> Verb:
    """A verb that shows a bar while it runs, and then its report."""

    def verb(options: argparse.Namespace) -> int:
        with bar() as on_progress:
            report, text, status = run(options, on_progress)
        _tell(options, report, text)
        return status

    return verb


def _show(run: Callable[[argparse.Namespace], tuple[Report, str, int]], options: argparse.Namespace) -> int:
    """Runs a verb that is done in seconds, and shows its report."""
    report, text, status = run(options)
    _tell(options, report, text)
    return status


def _tell(options: argparse.Namespace, report: Report, text: str) -> int:
    """Prints the report for a program or for a person."""
    print(json.dumps(report) if options.json else text)
    return 0


def _count(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected at least 1")
    return number


@contextmanager
def _count_bar(what: str, unit: str) -> Iterator[OnProgress]:
    """A bar with the number done and time left on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    with _bar(what, TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as show:
        yield show


@contextmanager
def _bytes_bar(what: str) -> Iterator[OnProgress]:
    """A bar with bytes, rate and time left on stderr."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _bar(what, *columns) as show:
        yield show


@contextmanager
def _bar(what: str, *columns: Any) -> Iterator[OnProgress]:
    """A bar that shows once there is something to tell."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


if __name__ == "__main__":
    sys.exit(main())
