"""Starts the ranks of one machine for ``navil-megatron train --nproc N``; a cluster uses torchrun.

The ranks get torchrun's environment variables. Unlike torchrun, a rank that stops on a user's mistake keeps its exit
code 2 and its one line, and ranks that save on SIGTERM get all the time they need. By whichever of the two it was
started, a rank ends with its launcher.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from navil_megatron.config.errors import EXIT_CODE, HANG_EXIT_CODE

_LAUNCHER = "NAVIL_LAUNCHER_PID"
"""Tells a rank which process started it."""
_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Set by torchrun's agent, whose children its ranks are."""
_PARENT_SECONDS = 1.0  # between two looks at the launcher
_POLL_SECONDS = 0.05
_STDERR = 2
_HANG_GRACE_SECONDS = 3.0  # ranks that end a hung run have asked all others to stop: who is still there now never will


def run_ranks(module: str, arguments: Sequence[str], num_ranks: int, grace_seconds: float = 15.0) -> int:
    """Runs ``python -m module arguments`` once for each rank and waits for all of them.

    SIGTERM and SIGINT are passed on to the ranks. After one rank fails, the others get ``grace_seconds`` to say why
    they stop too; then they are killed, for they wait for a rank that is gone.

    Returns:
        0 if every rank succeeded; 2 if one stopped on a user's mistake; otherwise the status of the first that failed
        (3: the run hung, 5: its numbers went bad), with 128 added to the number of a signal, as a shell reports it.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:  # a port that nothing listens on
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": listener.getsockname()[1]}
    command = [sys.executable, "-m", module, *arguments]
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(num_ranks):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            settings = numbers | address | {_LAUNCHER: os.getpid()}
            environment = os.environ | {name: str(value) for name, value in settings.items()}
            # A session of its own: the terminal's Ctrl-C reaches a rank once, through pass_on.
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return _wait(ranks, grace_seconds)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_with_launcher() -> None:
    """Makes this rank end soon after the process that started it: ranks whose launcher was killed would go on writing.

    Without a launcher, as when a scheduler starts each rank, nothing is watched: a shell may end before its jobs. To be
    called first of all, while the parent is surely the launcher.
    """
    # Not PR_SET_PDEATHSIG: that follows the thread that forked, and comes too when this thread ends before its process.
    if _LAUNCHER in os.environ or _TORCHRUN in os.environ:
        launcher = int(os.environ.get(_LAUNCHER, os.getppid()))
        threading.Thread(target=_watch_parent, args=(launcher,), name="launcher", daemon=True).start()


def _watch_parent(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_PARENT_SECONDS)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):  # what it wrote to may be gone as well
            os.write(_STDERR, f"error: the launcher, process {launcher}, is gone; its ranks end\n".encode())
    os._exit(1)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], grace_seconds: float) -> int:
    """Waits until all ranks are done, or until the grace after the first failure is over."""
    failed: list[int] = []
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        if deadline is None and any(rank.poll() for rank in ranks):
            failed = [rank.returncode for rank in ranks if rank.returncode]
            deadline = time.monotonic() + grace_seconds
        if deadline is not None and any(rank.returncode == HANG_EXIT_CODE for rank in ranks):
            deadline = min(deadline, time.monotonic() + _HANG_GRACE_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    codes = failed + [rank.returncode for rank in ranks if rank.returncode]
    if EXIT_CODE in codes:
        return EXIT_CODE
    first = codes[0] if codes else 0
    return 128 - first if first < 0 else first
