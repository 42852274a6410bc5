"""The ``navil-megatron`` command: makes a parser of the verbs, runs one of them, and prints what it came to.

What a user can mend is printed as ``error: ...`` lines and exits with code 2; ``--json`` prints one JSON object, last
on stdout.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from navil_megatron import __version__
from navil_megatron.config.errors import EXIT_CODE, WRONG_PATH, UserError, describe, printable
from navil_megatron.verbs.convert import CONVERT_VERBS
from navil_megatron.verbs.data import DATA_VERBS
from navil_megatron.verbs.doctor import doctor
from navil_megatron.verbs.exported import EXPORTED_VERBS
from navil_megatron.verbs.init import init
from navil_megatron.verbs.plan import plan
from navil_megatron.verbs.replay import replay
from navil_megatron.verbs.report import report
from navil_megatron.verbs.scaling import SCALING_VERBS
from navil_megatron.verbs.tokenizer import tokenizer
from navil_megatron.verbs.train import train
from navil_megatron.verbs.verb import Outcome, Verb

VERBS = (
    tokenizer,
    init,
    train,
    report,
    replay,
    plan,
    *DATA_VERBS,
    *CONVERT_VERBS,
    *SCALING_VERBS,
    *EXPORTED_VERBS,
    doctor,
)
"""In the order of the help."""

GROUPS = {
    "data": "make what a run reads",
    "convert": "between sharded checkpoints and Hugging Face folders",
    "scaling": "how large the visual encoder should be, from a study's results",
}
"""First word of verbs of two words -> one line of help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and gives the exit code."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse closes a list of positionals at the first option, so overrides that follow one come back here.
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    verb: Verb = options.verb
    try:
        _require_packages(verb)
        options.say = partial(print, flush=True)
        with _bar(verb) as options.on_progress:
            outcome: Outcome = verb.run(options)
        text = json.dumps(outcome.report) if verb.has_json and options.json else outcome.text
        if text:
            print(text.encode("utf-8", "backslashreplace").decode())  # names of files may be any bytes
        return outcome.status
    except UserError as error:
        print(describe(error), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        # The others are the machine's fault: a disk that is full or fails, a network that does.
        return EXIT_CODE if error.errno in WRONG_PATH else 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> ArgumentParser:
    """Every verb with its options, help and example."""
    parser = ArgumentParser(prog="navil-megatron", description="Pretrains NaViL on megatron-core.")
    parser.add_argument("--version", action="version", version=f"navil-megatron {__version__}")
    places = {"": parser.add_subparsers(required=True, metavar="VERB")}
    for verb in VERBS:
        group, _, name = verb.words.rpartition(" ")
        if group not in places:
            grouped = places[""].add_parser(group, help=GROUPS[group], description=_sentence(GROUPS[group]))
            places[group] = grouped.add_subparsers(required=True, metavar="VERB")
        _add_verb(places[group], name, verb)
    return parser


def _add_verb(place: Any, last_word: str, verb: Verb) -> None:
    parser = place.add_parser(
        last_word,
        help=verb.what.replace("%", "%%"),
        description=_sentence(verb.what),
        epilog=f"example:\n  {verb.example}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=verb)
    if verb.has_json:
        parser.add_argument("--json", action="store_true", help="print the report as one JSON object, last on stdout")
    for name, settings in verb.arguments:
        parser.add_argument(name, **settings)


def _sentence(what: str) -> str:
    return f"{what[0].upper()}{what[1:]}."


def _require_packages(verb: Verb) -> None:
    """Refuses a verb that lacks what it needs besides the package's own requirements."""
    missing = [module for module in verb.needs.modules if find_spec(module) is None] if verb.needs else []
    if verb.needs and missing:
        raise UserError(
            f"{verb.words} needs {', '.join(missing)}, not installed here: pip install "
            f"'navil_megatron[{verb.needs.name}]'"
        )


@contextmanager
def _bar(verb: Verb) -> Iterator[Callable[[int, int], None]]:
    """What a verb tells (done, of how much): a bar on stderr, from the first time on."""
    with ExitStack() as shown:
        bars: list[Any] = []

        def on_progress(done: int, total: int) -> None:
            if not bars:
                bars.append(shown.enter_context(_progress(verb)))
            bars[0].update(bars[0].task_ids[0], completed=done, total=total)

        yield on_progress


def _progress(verb: Verb) -> Any:
    """rich's bar for what the verb counts; of bytes the rate too."""
    from rich import progress
    from rich.console import Console

    name = verb.words.rpartition(" ")[2]
    columns = [progress.TextColumn(verb.counts), progress.BarColumn(), progress.MofNCompleteColumn()]
    if verb.counts == "bytes":
        rate = progress.TransferSpeedColumn()
        columns = [progress.TextColumn(name), progress.BarColumn(), progress.DownloadColumn(), rate]
    bar = progress.Progress(*columns, progress.TimeRemainingColumn(), console=Console(stderr=True))
    bar.add_task(name, total=None)
    return bar


if __name__ == "__main__":
    sys.exit(main())
