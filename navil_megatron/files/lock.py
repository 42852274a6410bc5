"""One owner at a time of what is written, on one machine or several that share its file system.

A lock is a folder with one file, named by its owner's token: it is taken by renaming a filled folder over nothing or
over an empty one, and left by removing the file. Both are atomic, and whoever removes an owner that is gone can remove
that owner alone, so of several takers one wins. A living owner touches its file. Others compare what they see of it
with what they saw before, and no clocks; on the machine of the owner they look at its process instead.
"""

import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from navil_megatron.config.errors import UserError

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""Ends the name of a lock."""
BEAT_SECONDS = 5.0
"""An owner touches its file this often."""
STALE_SECONDS = 60.0
"""An owner on another machine whose file was not touched for so long is gone."""
_LOOK_SECONDS = 0.25  # between two looks at an owner on another machine
_STDERR = 2
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a lock."""

    pid: int
    started: int
    """Clock ticks from the boot to its start: another process that got the same number later started later."""
    namespace: str
    """Boot and pid namespace in which the number means something; empty: unknown."""
    host: str
    since: str

    @classmethod
    def this_process(cls) -> Self:
        """As others see it."""
        pid = os.getpid()
        return cls(pid, _start_of(pid) or 0, _namespace(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """What a lock says; of a file that a crash of its machine cut short, nobody that is known."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError, PermissionError):
            return cls(0, 0, "", "a machine that is not known", "")

    @property
    def is_near(self) -> bool:
        """Whether its number means the same process to this one."""
        return self.namespace != "" and self.namespace == _namespace()

    @property
    def lives(self) -> bool:
        """Whether the process of a near owner is still there."""
        return _start_of(self.pid) == self.started

    def __str__(self) -> str:
        """As a message tells it."""
        return f"process {self.pid} on {self.host}" + (f" since {self.since}" if self.since else "")


@contextmanager
def owned(path: Path, what: str, remedy: str = "wait for it, or stop it") -> Iterator[None]:
    """Makes this process the only owner of ``what`` until the block ends; ``path`` is the lock.

    The lock of an owner that was killed is taken over: at once if it was on this machine, otherwise once its file was
    not touched for ``STALE_SECONDS``. A process that finds itself replaced so, because it stood still, ends at once.

    Raises:
        UserError: Another process owns it; the line says which, and ``remedy``.
        OSError: The lock cannot be written.
    """
    token = secrets.token_hex(8)
    _take(path, token, what, remedy)
    stopped = threading.Event()
    arguments = (path / token, what, stopped)
    beating = threading.Thread(target=_beat, args=arguments, name=f"lock of {path}", daemon=True)
    beating.start()
    try:
        yield
    finally:
        stopped.set()
        beating.join()
        with suppress(OSError):  # what goes wrong here leaves a lock without a living owner
            (path / token).unlink()
            path.rmdir()  # fails where the next owner is there already


def _take(path: Path, token: str, what: str, remedy: str) -> None:
    filled = path.with_name(f"{path.name}.{token}")
    filled.mkdir(parents=True)
    try:
        (filled / token).write_text(json.dumps(asdict(Owner.this_process())))
        watch = _Watch()
        while not _moved(filled, path, token):
            if (other := _owner_file(path)) is None:
                with suppress(OSError):  # not every file system renames over an empty folder
                    path.rmdir()
                continue
            try:
                owner, touched = Owner.from_file(other), other.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            is_gone = not owner.lives if owner.is_near else watch.is_still(other.name, touched)
            if is_gone:
                logger.warning("taking over %s from %s, which is gone", what, owner)
                other.unlink(missing_ok=True)
            elif owner.is_near or watch.has_moved:
                raise UserError(f"{what} is being written by another process; {remedy} ({owner}; {path})")
            else:
                if watch.is_new:
                    logger.warning("%s has an owner, %s: looking up to %d s", what, owner, STALE_SECONDS)
                time.sleep(_LOOK_SECONDS)
    finally:
        with suppress(OSError):
            (filled / token).unlink(missing_ok=True)
            filled.rmdir()


def _moved(filled: Path, path: Path, token: str) -> bool:
    """Tries to make a filled folder the lock."""
    try:
        filled.rename(path)
    except OSError as error:
        # A server whose answer was lost was asked a second time: then the first one did it.
        if not (path / token).exists() and error.errno not in _OCCUPIED:
            raise
    return (path / token).exists()


def _owner_file(path: Path) -> Path | None:
    """The file of the present owner; ``None``: nobody's, for a moment at least."""
    with suppress(FileNotFoundError):
        return next(path.iterdir(), None)
    return None


class _Watch:
    """What one watcher saw of an owner on another machine."""

    def __init__(self) -> None:
        self._seen: tuple[str, int] | None = None
        self._looked, self._still = 0.0, 0.0
        self.is_new = self.has_moved = False

    def is_still(self, name: str, touched: int) -> bool:
        """Whether the owner's file was not touched for too long."""
        now = time.monotonic()
        self.is_new = self._seen is None or self._seen[0] != name
        self.has_moved = not self.is_new and self._seen != (name, touched)
        # Looks are added up, not read off a clock: a watcher that was paused itself has not looked.
        self._still = 0.0 if self.is_new or self.has_moved else self._still + min(now - self._looked, 1.0)
        self._seen, self._looked = (name, touched), now
        return self._still >= STALE_SECONDS


def _beat(file: Path, what: str, stopped: threading.Event) -> None:
    """The thread of an owner: touches its file, and ends the process where another has taken its place."""
    while not stopped.wait(BEAT_SECONDS):
        try:
            os.utime(file)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                logger.warning("cannot touch %s (%s), trying again", file, error)
                continue
            line = (
                f"error: this process on {socket.gethostname()} no longer owns {what}: its lock {file.parent} was "
                f"removed, or taken over as the process stood still for {STALE_SECONDS:.0f} s; it ends\n"
            )
            os.write(_STDERR, line.encode())
            os._exit(1)


def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """When a process started; ``None``: it is gone, be it that nobody has asked for its exit status yet."""
    try:
        # Its name, in brackets, may hold anything: brackets too.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
