"""What a verb is: a record that ``cli.py`` makes a parser of, runs and reports."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Argument(NamedTuple):
    """One argument, as ``argparse.ArgumentParser.add_argument`` takes it."""

    name: str
    settings: dict[str, Any]


class Extra(NamedTuple):
    """Packages that not every installation has."""

    name: str  # of the extra in setup.py that installs them
    modules: tuple[str, ...]  # what is imported of them


class Outcome(NamedTuple):
    """What a verb came to."""

    report: dict[str, Any]  # for a program: what ``--json`` prints
    text: str  # for a person; empty where all is told already
    status: int = 0


@dataclass(frozen=True)
class Verb:
    """One verb of the command."""

    words: str
    """What is typed: ``train``, ``convert to-hf``."""
    what: str
    example: str
    """The lines under ``example:``."""
    arguments: tuple[Argument, ...]
    """In the order of the help. One that is called ``overrides`` gets every ``section.field=value``."""
    run: Callable[[Namespace], Outcome]
    """Takes the parsed options, and among them ``on_progress``, to be told how much is done and of how much, and
    ``say``, which prints what cannot wait for the end."""
    counts: str = ""
    """What ``on_progress`` is told: bytes, shards, samples."""
    needs: Extra | None = None
    """What must be installed besides."""
    has_json: bool = True
    """Whether there is a report, and so ``--json``."""


def verb(
    words: str, what: str, example: str, *arguments: Argument, **rest: Any
) -> Callable[[Callable[[Namespace], Outcome]], Verb]:
    """Makes the function below it a verb; takes the other fields of ``Verb``."""
    return lambda run: Verb(words, what, example, arguments, run, **rest)
