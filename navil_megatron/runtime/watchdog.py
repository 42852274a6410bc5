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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from navil_megatron.config.errors import HANG_EXIT_CODE
from navil_megatron.runtime.hang_report import hang_line
from navil_megatron.runtime.peers import Message, Peers
from navil_megatron.runtime.whereabouts import (
    ModuleNames,
    Phase,
    Position,
    Whereabouts,
    frames_of_error,
    frames_of_step,
    module_of,
    operation_of,
    place_of,
    purpose,
)

_LONGEST_BEAT_SECONDS = 1.0
_BEATS_IN_TIMEOUT = 20
_HAND_OVER_SECONDS = 20.0
"""How long a rank waits for the line of a lower rank before it writes its own."""
_SETTLE_SECONDS = 3.0
"""How long the survivors look for the rank that closed their connections."""
_STACKS_SECONDS = 10.0
"""Most time for writing stacks: the log folder may be on the file system that hangs."""
_STDERR = 2
_SHOW_CURSOR = "\x1b[?25h\n"


class Watchdog:
    """One rank's watch over itself; made by ``Session``."""

    def __init__(self, peers: Peers, stage: int, groups: Sequence[Any], timeout_seconds: float, logs: Path) -> None:
        """Starts watching the calling thread.

        Args:
            peers: The other ranks' watchdogs.
            stage: Pipeline stage of this rank.
            groups: Process groups whose ranks all begin the same collectives.
            timeout_seconds: How long nothing may move.
            logs: Folder for the stacks.
        """
        self.rank, self.stage, self.logs = peers.rank, stage, logs
        self.position = Position()
        self._peers, self._timeout = peers, timeout_seconds
        self._groups = {f"{purpose(group)} {group.group_name}": group for group in groups if group.size() > 1}
        self._chunks: Sequence[nn.Module] = ()
        self._training_thread = threading.get_ident()
        self._left_behind: list[FrameType] = []
        self._asked_by: int | None = None
        self._left: set[int] = set()
        self._closed = self._leaving = self._stopping = False
        self._stalled = 0.0
        self._wake = threading.Event()
        self._stages = dict(enumerate(peers.exchange(stage)))
        peers.answer(self._answer)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, groups: Any, timeout_seconds: float, logs: Path, one_machine: bool) -> Self:
        """Opens this rank's watch; every rank calls it at the same point.

        Args:
            groups: megatron-core's process groups.
            timeout_seconds: How long nothing may move.
            logs: Folder for the stacks.
            one_machine: All ranks run on this machine.
        """
        # Stages send different numbers of messages through the pipeline's group, so its counts cannot be compared.
        comparable = [torch.distributed.group.WORLD, *vars(groups).values()]
        members = [
            group
            for group in comparable
            if isinstance(group, torch.distributed.ProcessGroup) and group.group_name != groups.pp.group_name
        ]
        return cls(Peers(one_machine), groups.pp.rank(), members, timeout_seconds, logs)

    def know(self, chunks: Sequence[nn.Module]) -> None:
        """Remembers the model, to name its modules."""
        self._chunks = chunks

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Notes that a part of the loop begins."""
        position = self.position
        position.phase, position.microbatch, position.direction = phase, 0, ""
        if step is not None:
            position.step = step
        position.num_marks += 1

    def forward(self, microbatch: int) -> None:
        """Notes that the forward pass of a microbatch begins."""
        self._pass(microbatch, "forward")

    def expect_backward(self, microbatch: int, output: Tensor) -> None:
        """Lets the backward pass note its begin when it reaches this output."""
        if output.requires_grad:
            output.register_hook(lambda gradient: self._pass(microbatch, "backward"))

    def _pass(self, microbatch: int, direction: str) -> None:
        position = self.position
        position.microbatch, position.direction = microbatch, direction
        position.num_marks += 1

    def _watch(self) -> None:
        """The thread that looks whether anything moves."""
        beat = min(_LONGEST_BEAT_SECONDS, self._timeout / _BEATS_IN_TIMEOUT)
        then, before = time.monotonic(), None
        while True:
            woken = self._wake.wait(beat)
            if self._closed:
                return
            now, state = time.monotonic(), self._state()
            # Beats are added up, not read off a clock: a process that was paused as a whole has not hung.
            self._stalled = self._stalled + min(now - then, 2 * beat) if state == before else 0.0
            then, before = now, state
            if woken or (self._stalled >= self._timeout and self._is_watched()):
                try:
                    self._end_run()
                except Exception:  # told, for the run must end all the same
                    sys.excepthook(*sys.exc_info())
                os._exit(HANG_EXIT_CODE)

    def _state(self) -> tuple[Any, ...]:
        """Changes with everything that moves: notes, collectives, and the line that the training thread is at."""
        frame = sys._current_frames().get(self._training_thread)
        line = (id(frame.f_code), frame.f_lasti) if frame else ()
        return self.position.num_marks, tuple(self._counts().values()), line

    def _counts(self) -> dict[str, int]:
        return {name: group._get_sequence_number_for_group() for name, group in self._groups.items()}

    def _is_watched(self) -> bool:
        """Whether standing still is a hang: reading a large file at the start or in a save may take its time."""
        alone_at_work = self.position.phase in ("start", "save")
        return not alone_at_work or bool(operation_of(frames_of_step(self._training_thread)))

    def whereabouts(self) -> Whereabouts:
        """Where this rank is now, or where it was when the others left it."""
        frames = self._left_behind or frames_of_step(self._training_thread)
        position = self.position
        return Whereabouts(
            rank=self.rank,
            stage=self.stage,
            step=position.step,
            phase=position.phase,
            microbatch=position.microbatch,
            direction=position.direction,
            module=module_of(frames, ModuleNames(self._chunks)),
            operation=operation_of(frames),
            place=place_of(frames),
            stalled_seconds=self._stalled,
            counts=self._counts(),
            cut_off=bool(self._left_behind),
        )

    def _answer(self, message: Message) -> Message:
        """Another rank's question; runs in the listening thread."""
        match message["ask"]:
            case "where":
                return asdict(self.whereabouts())
            case "report" if not self._leaving:
                self._asked_by = int(message["rank"])
                self._wake.set()
                return {"takes_over": True}
            case "leave":
                self._left.add(int(message["rank"]))
            case "stop":
                self._stopping = True
                self._save_stacks()
                # A moment later, for the answer says that the stacks are written. The asking rank told why.
                threading.Timer(0.1, os._exit, (HANG_EXIT_CODE,)).start()
        return {"takes_over": False}

    def _end_run(self) -> None:
        """The lowest rank that answers tells; the others wait for its order to stop."""
        if self._asked_by is None:
            for lower in range(self.rank):
                if (self._peers.ask(lower, {"ask": "report", "rank": self.rank}) or {}).get("takes_over"):
                    time.sleep(_HAND_OVER_SECONDS)
                    break
        answers = self._all_whereabouts()
        if self._stopping:  # somebody else told while this rank looked around
            time.sleep(_HAND_OVER_SECONDS)
        asked_by = self.rank if self._asked_by is None or answers[self._asked_by] is None else self._asked_by
        line = hang_line(answers, self._left, self._stages, asked_by, str(self.logs / "stacks-rank*.txt"))
        # Not through logging: a thread that hangs may hold its lock. A progress bar hides the cursor: show it.
        os.write(_STDERR, f"{_SHOW_CURSOR if os.isatty(_STDERR) else ''}{line}\n".encode())
        self._ask_all({"ask": "stop"}, [rank for rank, answer in answers.items() if answer and rank != self.rank])
        self._save_stacks()

    def _all_whereabouts(self) -> dict[int, Whereabouts | None]:
        others = [rank for rank in self._stages if rank != self.rank]
        found = self._ask_all({"ask": "where"}, others)
        answers = {rank: Whereabouts(**answer) if answer else None for rank, answer in zip(others, found, strict=True)}
        return dict(sorted((answers | {self.rank: self.whereabouts()}).items()))

    def _ask_all(self, message: Message, ranks: Sequence[int]) -> list[Message | None]:
        with ThreadPoolExecutor(16, thread_name_prefix="watchdog") as threads:
            return list(threads.map(lambda rank: self._peers.ask(rank, message), ranks))

    def _save_stacks(self) -> None:
        writing = threading.Thread(target=self._write_stacks, daemon=True)
        writing.start()
        writing.join(_STACKS_SECONDS)

    def _write_stacks(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / f"stacks-rank{self.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def leave(self, error: BaseException) -> None:
        """Tells apart who failed: a rank that others left ends the run with its line, any other tells them that it
        leaves for a reason of its own.
        """
        if _is_lost_connection(error):
            self._left_behind = frames_of_error(error.__traceback__)
            deadline = time.monotonic() + _SETTLE_SECONDS
            while time.monotonic() < deadline:
                silent = {rank for rank, answer in self._all_whereabouts().items() if answer is None}
                if silent and silent <= self._left:
                    os._exit(HANG_EXIT_CODE)  # they say why themselves
                if silent:
                    self._wake.set()
                    time.sleep(2 * _HAND_OVER_SECONDS)
                time.sleep(0.1)
        self._leaving = True
        self._ask_all({"ask": "leave", "rank": self.rank}, [rank for rank in self._stages if rank != self.rank])

    def close(self) -> None:
        """Ends the watch."""
        self._closed = True
        self._wake.set()
        self._thread.join()
        self._peers.close()


def _is_lost_connection(error: BaseException) -> bool:
    """Whether the backend says that another rank closed its connection, or that a collective failed for it."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )
