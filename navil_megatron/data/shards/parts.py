"""A long work over many shards, done in parts that survive a kill: each leaves a small index of its own behind.

The parts lie in a folder beside the index that they will become. A part has its final name only when it is complete,
and the name says what it was made from; so a second run takes up what fits and does the rest.
"""

import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch

from navil_megatron.config.errors import UserError
from navil_megatron.data.shards.index_build import ShardPart
from navil_megatron.data.shards.shard_index import Shard, SourceIndex, save_index

type OnProgress = Callable[[int, int], None]
"""Called with (shards done, shards in all); whoever has a terminal draws a bar with it."""


@dataclass(frozen=True, slots=True)
class PartFiles:
    """Where one part is kept."""

    index: Path

    @property
    def rejected(self) -> Path:
        """Its rejected samples as JSON lines; written first, so that the index says that the part is complete."""
        return self.index.with_suffix(".rejected.jsonl")

    def is_complete(self) -> bool:
        """Whether the part can be taken as it is."""
        try:
            SourceIndex(self.index)
        except UserError:
            return False
        return self.rejected.exists()

    def save(self, part: ShardPart, where: str, tokenizer: bytes) -> None:
        """Writes the part; ``where`` names the shard in the list of rejected samples."""
        self.index.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"shard": where, "key": key, "reason": reason}) for key, reason in part.rejected]
        self.rejected.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        save_index(self.index, [part.samples], [part.images], [part.shard], tokenizer)


def parts_folder(index: Path) -> Path:
    """Where the parts of an index are kept until it is complete."""
    return Path(f"{index}.parts")


def rejected_path(index: Path) -> Path:
    """Where all rejected samples of an index are listed."""
    return Path(f"{index}.rejected.jsonl")


class _Column(Sequence[np.ndarray]):
    """One table of every part, read when it is its turn."""

    def __init__(self, parts: Sequence[PartFiles], table: str) -> None:
        self._parts, self._table = parts, table

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: Any) -> Any:
        return getattr(SourceIndex(self._parts[number].index), self._table)


def merge_parts(index: Path, parts: Sequence[PartFiles], tokenizer: bytes) -> Counter[str]:
    """Writes the index and its list of rejected samples, removes the parts, and counts the rejected by reason.

    Raises:
        UserError: no sample is any good.
    """
    reasons: Counter[str] = Counter()
    listed = rejected_path(index)
    partial = Path(f"{listed}.partial")
    with partial.open("wb") as file:
        for part in parts:
            for line in part.rejected.read_bytes().splitlines(keepends=True):
                file.write(line)
                reasons[json.loads(line)["reason"]] += 1
    os.replace(partial, listed)
    filled: list[tuple[PartFiles, Shard]] = []
    for part in parts:
        (shard,) = SourceIndex(part.index).shards
        if shard.num_samples:
            filled.append((part, shard))
    if not filled:
        shutil.rmtree(parts_folder(index))
        told = "; ".join(f"{reason}: {count}" for reason, count in reasons.most_common()) or "there are none"
        raise UserError(f"no sample is any good ({told}): check paths and format, see {listed}")
    kept = [part for part, _ in filled]
    save_index(index, _Column(kept, "samples"), _Column(kept, "images"), [shard for _, shard in filled], tokenizer)
    shutil.rmtree(parts_folder(index))
    return reasons


def run_tasks[T](
    work: Callable[[T], None], tasks: Sequence[T], total: int, jobs: int, on_progress: OnProgress | None
) -> None:
    """Does every task, here or in so many processes; what is done tells ``on_progress``.

    Args:
        work: does one task; pickles, and is sent to a process once.
        tasks: what is left to do.
        total: tasks in all, with those that an earlier run did.
        jobs: processes; 1: this one alone.
        on_progress: called with (done, total) after every task, and once before.

    Raises:
        UserError: a process was killed.
    """
    for done, _ in enumerate(_finished(work, tasks, jobs), total - len(tasks)):
        if on_progress is not None:
            on_progress(done, total)


def _finished[T](work: Callable[[T], None], tasks: Sequence[T], jobs: int) -> Iterator[None]:
    """Yields once before the first task and after every one."""
    yield
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            work(task)
            yield
        return
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, _start_worker, (work,)) as pool:
        futures: list[Future[None]] = [pool.submit(_do, task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                yield
        except BrokenExecutor:
            raise UserError(
                "a process was killed, perhaps for lack of memory: run the same again with fewer --jobs, it goes on"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Worker:
    """What a worker process was started with."""

    work: Callable[[Any], None]


def _start_worker(work: Callable[[Any], None]) -> None:
    _Worker.work = staticmethod(work)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes it and ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers of a killed command would go on writing."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(task: Any) -> None:
    _Worker.work(task)
