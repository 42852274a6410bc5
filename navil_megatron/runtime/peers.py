"""Questions between the watchdogs of a run: one line of JSON there, one back, over a connection of its own each.

No traffic until somebody asks, and independent of every collective and of the rendezvous store.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

type Message = dict[str, Any]

_ANSWER_SECONDS = 2.0  # a watchdog answers in milliseconds unless its process is stopped
_LONGEST_LINE = 1 << 20
_ANY_ROUTE = "192.0.2.1"
"""An address of nobody (RFC 5737): connecting a datagram socket to it sends nothing and picks the outward interface."""


class Peers:
    """The ranks of the default process group, each reachable at an address of its own."""

    def __init__(self, stage: int, one_machine: bool) -> None:
        """Listens, and learns where the other ranks listen; every rank makes one at the same point."""
        self.rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._listener = socket.create_server(("127.0.0.1" if one_machine else "", 0), backlog=num_ranks)
        address = (_own_address(one_machine), self._listener.getsockname()[1])
        everyone: list[Any] = [None] * num_ranks
        torch.distributed.all_gather_object(everyone, (address, stage, secrets.token_hex(16)))
        self._addresses, self.stages, tokens = zip(*everyone, strict=True)
        """Pipeline stage of each rank."""
        self._token = tokens[0]

    def listen(self, answer: Callable[[Message], Message]) -> None:
        """Lets a thread answer what the other ranks ask."""
        self._thread = threading.Thread(target=self._listen, args=(answer,), name="watchdog-answers", daemon=True)
        self._thread.start()

    def ask(self, rank: int, message: Message) -> Message | None:
        """What a rank answers; ``None`` if it is gone, stopped or closed."""
        try:
            with socket.create_connection(self._addresses[rank], timeout=_ANSWER_SECONDS) as connection:
                connection.sendall(json.dumps(message | {"token": self._token}).encode() + b"\n")
                with connection.makefile("rb") as lines:
                    answer: Message = json.loads(lines.readline(_LONGEST_LINE))
                    return answer
        except (OSError, ValueError):
            return None

    def ask_others(self, message: Message, skip: Collection[int] = ()) -> dict[int, Message | None]:
        """What every other rank answers, but for some."""
        others = [rank for rank in range(len(self.stages)) if rank != self.rank and rank not in skip]
        with ThreadPoolExecutor(16, thread_name_prefix="watchdog") as threads:
            return dict(zip(others, threads.map(lambda rank: self.ask(rank, message), others), strict=True))

    def close(self) -> None:
        """Stops answering."""
        # Closing alone would leave the thread in accept; a shutdown wakes it.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _listen(self, answer: Callable[[Message], Message]) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            # Whoever asked, and whatever went wrong: the next one gets its answer.
            with contextlib.suppress(Exception), connection, connection.makefile("rb") as lines:
                connection.settimeout(_ANSWER_SECONDS)
                message = json.loads(lines.readline(_LONGEST_LINE))
                if secrets.compare_digest(str(message["token"]), self._token):
                    connection.sendall(json.dumps(answer(message)).encode() + b"\n")


def _own_address(one_machine: bool) -> str:
    """Where the other ranks reach this one: the interface that leads to the first rank, or outward from its machine."""
    for target in () if one_machine else (os.environ.get("MASTER_ADDR", _ANY_ROUTE), _ANY_ROUTE):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            found: str = probe.getsockname()[0]
            if not found.startswith("127."):
                return found
    return "127.0.0.1" if one_machine else socket.gethostname()
