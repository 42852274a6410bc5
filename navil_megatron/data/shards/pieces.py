"""A long work over many shards, done in pieces that survive a kill: each leaves a small index of its own behind.

The pieces lie in a folder beside the index that they will become. A piece has its final name only when it is complete,
and the name says what it was made from; so a second run takes up what fits and does the rest.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.data.shards.index_report import report_index
from navil_megatron.data.shards.shard_index import ShardEntries, SourceIndex, save_index
from navil_megatron.files.atomic_file import new_file
from navil_megatron.files.lock import LOCK, owned
from navil_megatron.files.worker_pool import Meter, OnProgress, Work, run_shares


@dataclass(frozen=True, slots=True)
class PieceFiles:
    """Where one piece is kept."""

    index: Path

    @property
    def rejected(self) -> Path:
        """Its rejected samples as JSON lines; written first, so that the index says that the piece is complete."""
        return self.index.with_suffix(".rejected.jsonl")

    def is_complete(self) -> bool:
        """Whether the piece can be taken as it is."""
        try:
            SourceIndex(self.index)
        except UserError:
            return False
        return self.rejected.exists()

    def save(self, entries: ShardEntries, where: str, tokenizer: str) -> None:
        """Writes the piece; ``where`` names the shard in the list of rejected samples."""
        self.index.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"shard": where, "key": key, "reason": reason}) for key, reason in entries.rejected]
        with new_file(self.rejected) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        save_index(self.index, lambda: [entries], [entries.shard], tokenizer)


def pieces_folder(index: Path) -> Path:
    """Where the pieces of an index are kept until it is complete."""
    return Path(f"{index}.parts")


def owned_index(index: Path) -> AbstractContextManager[None]:
    """Whoever makes an index owns its shards and its pieces; UserError where another process does."""
    return owned(Path(f"{index}{LOCK}"), str(index))


def merge_pieces(index: Path, pieces: Sequence[PieceFiles], tokenizer: str) -> dict[str, Any]:
    """Writes the index and the list of rejected samples, removes the pieces, and reports; UserError: none is good."""
    reasons: Counter[str] = Counter()
    firsts: dict[str, str] = {}
    listed = Path(f"{index}.rejected.jsonl")
    with new_file(listed) as file:
        for piece in pieces:
            for line in piece.rejected.read_bytes().splitlines(keepends=True):
                file.write(line)
                left_out = json.loads(line)
                reasons[left_out["reason"]] += 1
                firsts.setdefault(left_out["reason"], left_out["key"])
    filled = {piece: shard for piece in pieces for shard in SourceIndex(piece.index).shards if shard.num_samples}
    if not filled:
        shutil.rmtree(pieces_folder(index))
        told = "; ".join(f"{reason}: {count}" for reason, count in reasons.most_common()) or "there are none"
        raise UserError(f"no sample is any good ({told}): check paths and format, see {listed}")
    save_index(index, lambda: (SourceIndex(piece.index) for piece in filled), list(filled.values()), tokenizer)
    shutil.rmtree(pieces_folder(index))
    return report_index(index, reasons, listed, firsts)


def run_tasks[T](
    work: Work[T, None], tasks: Sequence[T], total: int, jobs: int, on_progress: OnProgress | None
) -> None:
    """Does the tasks that are left of ``total``, here or in so many processes; UserError where one was killed."""
    meter = Meter(total, on_progress)
    meter.add(total - len(tasks))
    try:
        run_shares(work, tasks, jobs, meter, prepare_worker)
    except ChildProcessError as error:
        raise UserError(f"{error}, it goes on") from None


def prepare_worker() -> None:
    """What a process that works on shards does first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    torch.set_num_threads(1)
