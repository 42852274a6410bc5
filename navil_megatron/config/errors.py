"""Errors that a user can cause and mend; entry points print them as ``error: ...`` lines and exit with code 2.

A message says what was found, what was expected and what to do. Anything else that goes wrong is a bug and
keeps its traceback.
"""

import errno
from collections.abc import Iterable

EXIT_CODE = 2
"""Exit status of a command that stopped because of a ``UserError``."""

HANG_EXIT_CODE = 3
"""Exit status of a rank whose run was ended because ranks waited for one another too long."""

OTHERS_STOPPED_EXIT_CODE = 4
"""Exit status of a rank that saved and left because only other ranks were asked to: for it the run is not over."""


NUMBERS_EXIT_CODE = 5
"""Exit status of a run that stopped because its numbers went bad: ``BadNumbers``."""

WRONG_PATH = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)
"""``errno`` of a path that cannot be read or written where another one could: the user's to mend."""


class UserError(Exception):
    """Something the user asked for cannot be done; the message is all they need to see."""

    exit_code = EXIT_CODE
    """Of a command that ends with it."""


class NetworkError(UserError):
    """A store did not answer, however often it was asked: nobody's mistake, and the same command may do it later."""

    exit_code = 1


class DamagedError(UserError):
    """What lies on the disk is not what was written there."""


class BadNumbers(UserError):
    """A run's own numbers are not to be trusted: not finite, far too large, or not the same where they must be."""

    exit_code = NUMBERS_EXIT_CODE


class ConfigError(UserError, ValueError):
    """A config that cannot be run, with every problem found in it."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        """Holds one problem, or all of them; each becomes one line of the message."""
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[str, ...]]]:
        """Keeps the list of problems when the error crosses a process boundary."""
        return type(self), (self.problems,)


def printable(text: str) -> str:
    """The text in one line that cannot steer a terminal: control characters, as names hold them, are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def describe(error: UserError) -> str:
    """The error as a terminal shows it: one ``error: ...`` line for each problem."""
    problems = error.problems if isinstance(error, ConfigError) else (" ".join(str(error).split("\n")),)
    return "\n".join(f"error: {printable(problem)}" for problem in problems)
