"""Every byte that an index knows of, read again shard by shard; behind ``data inspect --check --deep``."""

from functools import partial
from pathlib import Path

from navil_megatron.config.errors import DamagedError
from navil_megatron.data.shards.pieces import prepare_worker
from navil_megatron.data.shards.source import Source
from navil_megatron.files.worker_pool import Meter, OnProgress, Tell, run_shares

_TOLD = 5  # damaged shards that the line names


def check_all_bytes(index: Path, jobs: int = 1, on_progress: OnProgress | None = None) -> None:
    """Compares texts, images and names of every shard, and all records of the index, with what was indexed.

    Raises:
        UserError: Shards are damaged, which are all counted, or one cannot be read.
    """
    source = Source(index)
    source.index.check_records()
    shards = range(len(source.index.shards))
    found = run_shares(partial(_check_one, index=index), shards, jobs, Meter(len(shards), on_progress), prepare_worker)
    if damaged := [problem for problem in found if problem is not None]:
        more = f"; and {len(damaged) - _TOLD} more" if len(damaged) > _TOLD else ""
        raise DamagedError(f"{len(damaged)} of {len(shards)} shards: {'; '.join(damaged[:_TOLD])}{more}")


def _check_one(_: int, number: int, tell: Tell, *, index: Path) -> str | None:
    """What is wrong with a shard."""
    try:
        Source(index).check_shard(number)
    except DamagedError as error:
        return str(error)
    finally:
        tell(1)
    return None
