"""A call beside the training: in a forked process, which sees this one's memory as it was at the fork."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable

# What torch's own workers use to end with their parent.
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

_NICE = 10
"""How much the process gives way to those that train."""


class BackgroundCall[T]:
    """A running call, until ``result``.

    Forked, not spawned: nothing is imported, copied or sent, and what happens to tensors here is not seen there. The
    call touches no device and no process group. Its process is killed when the one that made it ends, however that
    ends, so it never writes into a folder that the next run has made anew.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        parent = os.getpid()
        self._answer, theirs = multiprocessing.Pipe(duplex=False)
        self._process = os.fork()
        if self._process == 0:
            try:
                _prctl_pr_set_pdeathsig(signal.SIGKILL)
                if os.getppid() == parent:
                    gc.disable()  # a cycle may hold tensors of a device, which is not there in a fork
                    os.nice(_NICE)
                    theirs.send(_outcome(call))
            finally:
                os._exit(0)
        theirs.close()

    def is_done(self) -> bool:
        """Whether ``result`` would not wait."""
        return self._answer.poll()

    def result(self) -> T | Exception:
        """What the call gave or raised; waits for it."""
        try:
            answer = self._answer.recv()
        except EOFError:
            answer = ChildProcessError("the process that should have done it was killed")
        self._answer.close()
        os.waitpid(self._process, 0)
        return answer


def _outcome[T](call: Callable[[], T]) -> T | Exception:
    try:
        return call()
    except Exception as error:
        return error
