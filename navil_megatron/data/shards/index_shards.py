"""One index over WebDataset tars that exist already, e.g. img2dataset's; behind ``navil-megatron data index``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from navil_megatron.data.shards.index_build import TokenCounter, index_shard
from navil_megatron.data.shards.pieces import PieceFiles, merge_pieces, owned_index, pieces_folder, run_tasks
from navil_megatron.data.shards.shard_files import expand_shards, stored_path, version_of
from navil_megatron.files.hashes import fingerprint
from navil_megatron.files.worker_pool import OnProgress, Tell


def index_shards(
    patterns: Sequence[str],
    index: Path,
    counter: TokenCounter,
    *,
    decode: bool = True,
    jobs: int = 1,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Makes or renews an index, and reports what it holds and what was left out why.

    Shards, given as paths, URLs or glob patterns, that an unfinished run did are not done again. ``decode``: as of
    ``index_shard``. ``counter`` pickles where ``jobs``, the processes, are more than 1.

    Raises:
        UserError: a shard is missing or cannot be read, another process is writing the index, or no sample is any good.
    """
    tasks = []
    for shard in expand_shards(patterns):
        made_from = "\0".join([shard, version_of(shard), counter.fingerprint, str(decode)])
        tasks.append((shard, PieceFiles(pieces_folder(index) / f"{fingerprint(made_from)}.index")))
    with owned_index(index):
        left = [task for task in tasks if not task[1].is_complete()]
        work = partial(_index_one, folder=index.parent, counter=counter, decode=decode)
        run_tasks(work, left, len(tasks), jobs, on_progress)
        return merge_pieces(index, [files for _, files in tasks], counter.fingerprint)


def _index_one(
    _: int, task: tuple[str, PieceFiles], tell: Tell, *, folder: Path, counter: TokenCounter, decode: bool
) -> None:
    shard, files = task
    name = stored_path(shard, folder)
    files.save(index_shard(shard, counter, decode=decode, name=name), name, counter.fingerprint)
    tell(1)
