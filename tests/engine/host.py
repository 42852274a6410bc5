"""Ranks of a rehearsal: forked from a server that has the engine loaded, in a process that holds that server.

Python keeps one fork server for a process, and that of the tests has megatron-core without the engine.
"""

import atexit
import functools
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.ranks import PRELOAD, RankFailure, run_ranks, start_fork_server


def run_rehearsed(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
    """``tests.ranks.run_ranks`` on CPU ranks that have Transformer Engine's Python over the stand-in.

    Raises:
        RankFailure: The first failure of any rank.
    """
    host = _host()
    host.send((world_size, pickle.dumps((fn, args)), timeout))
    failure, results = host.recv()
    if failure is not None:
        raise RankFailure(failure)
    return [pickle.loads(result) for result in results]


@functools.cache
def _host() -> Connection:
    """The end of a pipe to the process that holds the server. It leaves when this end is closed."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), name="engine host")
    process.start()
    theirs.close()
    atexit.register(ours.close)
    return ours


def _serve(requests: Connection) -> None:
    """Runs what is asked for, and never looks into it: unpickling would load the engine, or torch, here."""
    start_fork_server(("tests.engine.loaded", *PRELOAD))
    while True:
        try:
            world_size, call, timeout = requests.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            requests.send((None, run_ranks(world_size, _run, call, timeout=timeout)))
        except RankFailure as failure:
            requests.send((str(failure), None))


def _run(rank: int, world_size: int, call: bytes) -> bytes:
    import tests.engine.loaded  # noqa: F401 # says what a server that could not load it has swallowed

    fn, args = pickle.loads(call)
    return pickle.dumps(fn(rank, world_size, *args))
