"""Runs that are made to hang: real training, a real fault in one rank, and what the run left behind."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType

from navil_megatron.config.data import SourceConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.shards.source import MAX_OPEN_FILES
from tests.e2e.runs import records
from tests.ranks import PRELOAD, RENDEZVOUS, start_session
from tests.unit.data_examples import write_samples

TIMEOUT_SECONDS = 2
GUILTY = 1
AFTER_STEP = 2
"""Outer faults come after this step."""


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    lines: list[str]
    """What the ranks wrote on stderr, without log records."""
    exit_codes: list[int | None]
    stacks: dict[int, str]
    """Text of the stack files by rank."""
    seconds: float
    """From the fault to the end of the last rank that could end."""


def run_until_it_ends(
    folder: Path,
    configs: list[NaViLConfig],
    *,
    outer: Callable[[int, NaViLConfig], None] | None = None,
    inner: Callable[[Path], None] | None = None,
    guilty: int = GUILTY,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Ending:
    """Trains on one rank for each config.

    Args:
        folder: For what the ranks write.
        configs: One for each rank; they differ in nothing but where the data lies.
        outer: Fault that this process causes, given the process id and config of the guilty rank.
        inner: Fault that the guilty rank brings along.
        guilty: The rank at fault.
        environment: Variables of all ranks.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    ranks = [
        context.Process(
            target=_rank,
            args=(rank, len(configs), config, folder, inner if rank == guilty else None, dict(environment)),
            daemon=False,
        )
        for rank, config in enumerate(configs)
    ]
    for process in ranks:
        process.start()
    try:
        while not _reached(configs[0], ranks):
            time.sleep(0.02)
        started = time.monotonic()
        if outer is not None:
            pid = ranks[guilty].pid
            assert pid is not None
            outer(pid, configs[guilty])
        for process in ranks:
            process.join(0 if outer is stop_process and process is ranks[guilty] else 30)
        seconds = time.monotonic() - started
    finally:
        for process in ranks:
            process.kill()
    for process in ranks:
        process.join()
    return Ending(
        lines=[line for rank in range(len(ranks)) for line in _told(folder / f"stderr-{rank}")],
        exit_codes=[process.exitcode for process in ranks],
        stacks={
            rank: path.read_text()
            for rank in range(len(ranks))
            if (path := Path(configs[0].logging.directory) / f"stacks-rank{rank}.txt").exists()
        },
        seconds=seconds,
    )


def _reached(config: NaViLConfig, ranks: Sequence[BaseProcess]) -> bool:
    """Whether the run is past the step after which faults come, or over."""
    return len(records(config, "train")) >= AFTER_STEP or not any(process.is_alive() for process in ranks)


def _told(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if " INFO " not in line]


def _rank(
    rank: int,
    world_size: int,
    config: NaViLConfig,
    folder: Path,
    inner: Callable[[Path], None] | None,
    environment: dict[str, str],
) -> None:
    """One rank's life, as in ``pretrain.py``."""
    import torch

    from navil_megatron.training.loop import train

    os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.environ |= {RENDEZVOUS: str(folder / "rendezvous"), **environment}
    torch.set_num_threads(1)
    if inner is not None:
        inner(folder)
    with start_session(rank, world_size, config) as session:
        train(config, session)
    os._exit(0)


def block_data(_pid: int, config: NaViLConfig) -> None:
    """Every shard of the guilty rank becomes a pipe that delivers nothing."""
    for shard in Path(config.data.train_sources[0].index).parent.glob("train-*.tar"):
        os.mkfifo(f"{shard}.fifo")
        os.replace(f"{shard}.fifo", shard)


def kill_process(pid: int, _config: NaViLConfig) -> None:
    """The kernel ends the guilty rank."""
    os.kill(pid, signal.SIGKILL)


def stop_process(pid: int, _config: NaViLConfig) -> None:
    """The guilty rank stops running but stays connected."""
    os.kill(pid, signal.SIGSTOP)


def skip_collective(_folder: Path) -> None:
    """The guilty rank leaves out a collective that all others begin, after its first steps."""
    from navil_megatron.runtime.session import Session

    ask, asked = Session.stop_asked, iter(range(1_000_000))
    Session.stop_asked = lambda self: ask(self) if next(asked) < AFTER_STEP else False  # type: ignore[method-assign]


def stick_in_forward(folder: Path) -> None:
    """The guilty rank stays in the forward pass of its first decoder layer."""
    _in_layer_of_step(lambda output: _stick_here(folder))


def stick_in_backward(folder: Path) -> None:
    """The guilty rank stays in the backward pass of its first decoder layer."""
    _in_layer_of_step(lambda output: output.register_hook(lambda gradient: _stick_here(folder)))


def dawdle(folder: Path) -> None:
    """The guilty rank is slow in one layer, but not too slow."""
    _in_layer_of_step(lambda output: time.sleep(0.6 * TIMEOUT_SECONDS))


def save_slowly(_folder: Path) -> None:
    """The disk of the guilty rank takes its time, once."""
    sync, seconds = os.fsync, iter([1.5 * TIMEOUT_SECONDS])
    os.fsync = lambda file: (time.sleep(next(seconds, 0)), sync(file))[1]


def _in_layer_of_step(act: Callable) -> None:
    """Once, at the second microbatch of a later step (two microbatches a step)."""
    from torch.nn.modules.module import register_module_forward_hook

    from navil_megatron.layers.transformer_layer import NaViLTransformerLayer

    seen: list[int] = []
    first: list[int] = []

    def hook(module, inputs, output):  # type: ignore[no-untyped-def]
        if not isinstance(module, NaViLTransformerLayer):
            return
        first.extend([] if first else [id(module)])
        if id(module) == first[0]:
            seen.append(1)
            if len(seen) == 2 * AFTER_STEP + 2:
                act(output[0] if isinstance(output, tuple) else output)

    register_module_forward_hook(hook)


def _stick_here(folder: Path) -> None:
    """Reads from a pipe that nobody writes to."""
    os.mkfifo(folder / "never")
    with open(folder / "never") as pipe:
        pipe.read()


def copies_of_data(config: NaViLConfig, folder: Path, world_size: int) -> list[NaViLConfig]:
    """The config once for each rank, with shards of its own: more of them than a rank keeps open."""
    import shutil

    made = write_samples(folder / "shards", "train", 2 * MAX_OPEN_FILES, per_shard=1)
    configs = []
    for rank in range(world_size):
        mine = folder / f"shards-{rank}"
        shutil.copytree(made.parent, mine)
        source = SourceConfig(index=str(mine / made.name))
        configs.append(replace(config, data=replace(config.data, train_sources=(source,))))
    return configs
