"""Ends a run whose ranks wait for one another longer than ``runtime.collective_timeout_seconds``, in one line.

Each rank watches itself from a thread and answers the other ranks' questions from a second one. Until something
stands still no rank talks: the step makes no collective, no device sync and no message. The ranks ask one another
directly because a store would be hosted by one of them, which may be the one that is gone.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.errors import HANG_EXIT_CODE
from navil_megatron.runtime.hang_report import hang_line
from navil_megatron.runtime.peers import Message, Peers
from navil_megatron.runtime.position import Position
from navil_megatron.runtime.whereabouts import Whereabouts, place_of, read_waits

_AT_DISK = ("checkpoint/", "files/", "megatron/core/dist_checkpointing/")  # places of one that saves or restores
_LONGEST_BEAT_SECONDS = 1.0
_BEATS_IN_TIMEOUT = 20
_HAND_OVER_SECONDS = 20.0  # how long a rank waits for the line of a lower rank before it writes its own
_SETTLE_SECONDS = 3.0  # how long the survivors look for the rank that closed their connections
_STACKS_SECONDS = 10.0  # most time for writing stacks: the log folder may be on the file system that hangs
_STDERR = 2
_SHOW_CURSOR = "\x1b[?25h\n"


class Watchdog:
    """One rank's watch over itself; made by ``Session``."""

    def __init__(self, stage: int, timeout_seconds: float, logs: Path, one_machine: bool) -> None:
        """Starts watching the calling thread; every rank makes one at the same point. Stacks go to ``logs``."""
        self.position = Position()
        self._peers, self._timeout, self._logs = Peers(stage, one_machine), timeout_seconds, logs
        self._training_thread = threading.get_ident()
        self._left: set[int] = set()
        self._lost_at: str | None = None
        self._stalled = 0.0
        self._closed = self._stopping = False
        self._wake = threading.Event()
        self._peers.listen(self._answer)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        """The thread that looks whether anything moves."""
        beat = min(_LONGEST_BEAT_SECONDS, self._timeout / _BEATS_IN_TIMEOUT)
        then, before = time.monotonic(), None
        while not (self._wake.wait(beat) and self._closed):
            now, state = time.monotonic(), self._state()
            # Beats are added up, not read off a clock: a process that was paused as a whole has not hung.
            self._stalled = self._stalled + min(now - then, 2 * beat) if state == before else 0.0
            then, before = now, state
            # It may be close() that woke this thread, just now.
            if not self._closed and (self._wake.is_set() or (self._stalled >= self._timeout and self._is_hang())):
                try:
                    self._end_run()
                except Exception:  # told, for the run must end all the same
                    traceback.print_exc()
                os._exit(HANG_EXIT_CODE)

    def _state(self) -> tuple[Any, ...]:
        """Changes with everything that moves: passes, layers, and the instruction that the training thread is at."""
        frame = sys._current_frames()[self._training_thread]  # not kept: its tensors would live on with it
        return self.position.step, self.position.last, id(frame.f_code), frame.f_lasti

    def _is_hang(self) -> bool:
        """Whether standing still is one: reading or writing a large file may take its time."""
        here = self.whereabouts()
        return bool(here.operation) or (here.step > 0 and not here.place.startswith(_AT_DISK))

    def whereabouts(self) -> Whereabouts:
        """Where this rank is now, or where it was when the others left it."""
        stack = traceback.walk_stack(sys._current_frames()[self._training_thread])
        place = place_of(frame for frame, _ in stack) if self._lost_at is None else self._lost_at
        return Whereabouts(
            rank=self._peers.rank,
            stage=self._peers.stages[self._peers.rank],
            step=self.position.step,
            position=str(self.position),
            place=place,
            stalled_seconds=self._stalled,
            is_cut_off=self._lost_at is not None,
            **read_waits(place),
        )

    def _ask_where(self) -> dict[int, Whereabouts | str]:
        """Where all ranks are, or why one does not say."""
        answers: dict[int, Whereabouts | str] = {self._peers.rank: self.whereabouts()}
        for rank, answer in self._peers.ask_others({"ask": "where"}).items():
            if answer and rank not in self._left:
                answers[rank] = Whereabouts(**answer)
            else:
                why = "it ended with an error of its own" if rank in self._left else "its process is gone or stopped"
                answers[rank] = f"rank {rank} (pipeline stage {self._peers.stages[rank]}, {why})"
        return dict(sorted(answers.items()))

    def _answer(self, message: Message) -> Message:
        """Another rank's question; runs in the listening thread."""
        match message["ask"]:
            case "where":
                return asdict(self.whereabouts())
            case "report" if self._peers.rank not in self._left:
                self._wake.set()
                return {"takes_over": True}
            case "leave":
                self._left.add(int(message["rank"]))
            case "stop":
                self._stopping = True
                self._write_stacks()
                # A moment later, for the answer says that the stacks are written. The asking rank told why.
                threading.Timer(0.1, os._exit, (HANG_EXIT_CODE,)).start()
        return {"takes_over": False}

    def _end_run(self) -> None:
        """The lowest rank that answers tells; the others wait for its order to stop."""
        rank = self._peers.rank
        # One after the other: it is one rank alone that asks all of them where they are.
        replies = (self._peers.ask(lower, {"ask": "report"}) for lower in range(rank))
        if any(reply is not None and reply["takes_over"] for reply in replies):
            time.sleep(_HAND_OVER_SECONDS)
        answers = self._ask_where()
        if self._stopping:  # somebody else told while this rank looked around
            time.sleep(_HAND_OVER_SECONDS)
        line = hang_line(answers, rank, str(self._logs / "stacks-rank*.txt"))
        # Not through logging: a thread that hangs may hold its lock. A progress bar hides the cursor: show it.
        os.write(_STDERR, f"{_SHOW_CURSOR if os.isatty(_STDERR) else ''}{line}\n".encode())
        self._peers.ask_others({"ask": "stop"}, skip=[other for other in answers if isinstance(answers[other], str)])
        self._write_stacks()

    def _write_stacks(self) -> None:
        threading.Timer(_STACKS_SECONDS, os._exit, (HANG_EXIT_CODE,)).start()
        self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"stacks-rank{self._peers.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def leave(self, error: BaseException) -> None:
        """Tells apart who failed: a rank that others left ends the run with its line, any other tells them that it
        leaves for a reason of its own.
        """
        # The backend's words for a rank that closed its connection, and for a collective that failed for it.
        is_lost = isinstance(error, torch.distributed.DistError)
        if is_lost or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
            self._lost_at = place_of([frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1])
            deadline = time.monotonic() + _SETTLE_SECONDS
            while time.monotonic() < deadline:
                replies = self._peers.ask_others({"ask": "nothing"}, skip=self._left)
                gone = self._left | {rank for rank, reply in replies.items() if reply is None}
                if gone and gone <= self._left:
                    os._exit(HANG_EXIT_CODE)  # they say why themselves
                if gone:
                    self._wake.set()
                    time.sleep(2 * _HAND_OVER_SECONDS)
                time.sleep(0.1)
        self._left.add(self._peers.rank)
        self._peers.ask_others({"ask": "leave", "rank": self._peers.rank})

    def close(self) -> None:
        """Ends the watch."""
        self._closed = True
        self._wake.set()
        self._thread.join()
        self._peers.close()
