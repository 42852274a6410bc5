"""How an example runs ``navil-megatron`` and its own scripts: one after the other, the first failure ends it."""

import signal
import subprocess
import sys
from types import FrameType

from rich.console import Console

from navil_megatron.cli import main as navil_megatron

console = Console()


def navil_command(*words: str) -> list[str]:
    """The ``navil-megatron`` command of this environment."""
    return [sys.executable, "-m", "navil_megatron.cli", *words]


def navil(*words: str) -> None:
    """One ``navil-megatron`` command."""
    run(navil_command(*words))


def navil_here(*words: str) -> None:
    """The same inside this process, which need not load everything again for each of many short commands."""
    check(navil_megatron(words), " ".join(["navil-megatron", *words[:2]]))


def run(command: list[str]) -> None:
    """A command whose failure ends the example. A stop is passed on and waited for, since a run saves when stopped."""
    process = subprocess.Popen(command)
    stopped_by: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        stopped_by.append(number)
        process.terminate()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopped_by:
        console.print("[yellow]stopped; start again to go on[/yellow]")
        raise SystemExit(128 + stopped_by[0])
    check(code, " ".join(command[1:4]))


def check(code: int, what: str) -> None:
    """End with the exit code of a step that failed."""
    if code:
        console.print(f"[red]{what} ended with exit code {code}[/red]")
        raise SystemExit(code)
