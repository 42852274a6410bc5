"""Shares of a long work, done here or by several processes that end with this one."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context, parent_process
from queue import Empty
from typing import Any

type OnProgress = Callable[[int, int], None]
"""Is told how much is done and how much there is in all, in bytes or in shards."""
type Tell = Callable[[int], None]
"""Is told how much more was done."""
type Work[S, R] = Callable[[int, S, Tell], R]
"""Number of a share, the share, and whom to tell -> the result. Pickles."""
_POLL_SECONDS = 0.1


class Meter:
    """Adds up what is done over all phases of a work, ``total`` in all, and tells ``on_progress`` of every addition."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self.total, self.done, self._told = total, 0, on_progress

    def add(self, count: int) -> None:
        """So much more."""
        self.done += count
        if self._told is not None:
            self._told(self.done, self.total)


def run_shares[S, R](
    work: Work[S, R], shares: Sequence[S], jobs: int, meter: Meter, prepare: Callable[[], None]
) -> list[R]:
    """What ``work`` gives for every share, in order, by so many processes (``jobs``; 1: this one alone).

    Shares are done in any order, each by one process. ``prepare`` is called first in every process that is started; its
    module is imported once for all of them.

    Raises:
        ChildProcessError: A process was killed.
    """
    if jobs == 1 or len(shares) < 2:
        return [work(number, share, meter.add) for number, share in enumerate(shares)]
    context = get_context("forkserver")
    context.set_forkserver_preload([prepare.__module__])
    told, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(min(jobs, len(shares)), context, _start_worker, (prepare, work, told, stop)) as pool:
        futures: list[Future[R]] = [pool.submit(_do_share, number, share) for number, share in enumerate(shares)]
        try:
            unfinished = deque(futures)
            while unfinished:
                running = list(islice(unfinished, 2 * jobs))  # of very many, these alone need looking at
                wait(running, _POLL_SECONDS, FIRST_EXCEPTION)
                _drain(told, meter)
                for future in filter(Future.done, running):
                    future.result()
                while unfinished and unfinished[0].done():
                    unfinished.popleft()
        except BrokenExecutor:
            raise ChildProcessError(
                "a process was killed, perhaps for lack of memory: run the same again with fewer --jobs"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _drain(told, meter)
    return [future.result() for future in futures]


def _drain(told: Any, meter: Meter) -> None:
    try:
        while True:
            meter.add(told.get_nowait())
    except Empty:
        return


class _Worker:
    """What a worker process was started with."""

    work: Work[Any, Any]
    told: Any
    stop: Any


def _start_worker(prepare: Callable[[], None], work: Work[Any, Any], told: Any, stop: Any) -> None:
    _Worker.work, _Worker.told, _Worker.stop = staticmethod(work), told, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes it and says stop
    prepare()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers of a killed command would go on writing."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do_share(number: int, share: Any) -> Any:
    return _Worker.work(number, share, _tell)


def _tell(count: int) -> None:
    if _Worker.stop.is_set():
        raise KeyboardInterrupt
    _Worker.told.put(count)
