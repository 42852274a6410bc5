"""Runs a function on several gloo ranks of this machine, fast: forked from a server that has torch and megatron loaded.

Ranks meet through a file, compute with one thread each, and never outlive the test: the first failure is raised with
its rank, and ranks that hang are killed after their stacks were written down.
"""

import dataclasses
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from navil_megatron.config.checkpoint import CheckpointConfig
from navil_megatron.config.data import DataConfig, SourceConfig
from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.logging import LoggingConfig
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.config.optimizer import OptimizerConfig
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.precision import PrecisionConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.runtime import RuntimeConfig
from navil_megatron.config.training import TrainingConfig
from navil_megatron.config.vision import VisionConfig

PRELOAD = (
    "navil_megatron.runtime",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.common.language_module.language_module",
    "megatron.core.models.mimo.model.base",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.transformer_layer",
    "navil_megatron.runtime.session",
    "navil_megatron.training.loop",
    "numpy.ma",
    "pytest",
    "tests.oracle",
)
"""Imported once in the fork server; a rank then starts in milliseconds instead of eight seconds."""

RENDEZVOUS = "NAVIL_TEST_RENDEZVOUS"
_sessions = itertools.count()


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message holds its number and its traceback."""


def start_fork_server(preload: Sequence[str] = PRELOAD) -> None:
    """Starts the server that ranks are forked from, which imports in the background.

    A process has one, and whoever starts it first decides what it imports: the converter's workers would import less,
    and every rank of a later test the rest again.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([*preload, "tests.frozen"])
    forkserver.ensure_running()


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
    """What ``fn(rank, world_size, *args)`` returns on each rank.

    Args:
        world_size: Ranks to start.
        fn: A function at module level.
        *args: Further arguments, picklable.
        timeout: Seconds until the ranks are taken for hung.

    Raises:
        RankFailure: The first failure of any rank.
    """
    start_fork_server()
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="navil-ranks-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(theirs, folder, timeout, rank, world_size, fn, args), daemon=False
            )
            process.start()
            theirs.close()
            ends[ours] = rank
            processes.append(process)
        try:
            return _collect(ends, processes, Path(folder), timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(ends: dict[Connection, int], processes: list[Any], folder: Path, timeout: float) -> list[Any]:
    """Waits for one message of every rank; after a failure only a moment longer, to find the first cause."""
    results: list[Any] = [None] * len(processes)
    failures: list[tuple[bool, float, int, str]] = []
    deadline = time.monotonic() + timeout + 5
    waiting = dict(ends)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        for end in ready:
            rank = waiting.pop(end)  # type: ignore[call-overload]
            when, text, result = _receive(end)  # type: ignore[arg-type]
            if text is None:
                results[rank] = pickle.loads(result)
            else:
                failures.append((_is_echo(text), when, rank, text))
                deadline = min(deadline, time.monotonic() + 1)
        if not ready:
            break
    if failures:
        _, _, rank, text = min(failures)
        raise RankFailure(f"rank {rank} of {len(processes)} failed:\n{text}{_stacks(folder, rank)}")
    if waiting:
        stacks = "".join(_stacks(folder, rank) for rank in waiting.values())
        raise RankFailure(f"ranks {sorted(waiting.values())} of {len(processes)} did not answer in time{stacks}")
    return results


def _is_echo(text: str) -> bool:
    """Whether a failure only says that another rank went away: its watchdog ends a rank that others left."""
    return any(words in text for words in ("closed by peer", "reset by peer", "died without a word"))


def _receive(end: Connection) -> tuple[float, str | None, bytes]:
    """When a rank ended, its traceback if it failed, and its pickled result."""
    try:
        return end.recv()
    except EOFError:
        return time.monotonic(), "the process died without a word (killed, or hung past its timeout)", b""


def _stacks(folder: Path, rank: int) -> str:
    """What a rank that hung was doing."""
    path = folder / f"stacks-{rank}"
    text = path.read_text() if path.exists() else ""
    return f"\n--- stacks of rank {rank} ---\n{text}" if text else ""


def _run_rank(
    end: Connection, folder: str, timeout: float, rank: int, world_size: int, fn: Callable[..., Any], args: tuple
) -> None:
    """The life of one rank."""
    import torch

    os.environ[RENDEZVOUS] = str(Path(folder) / "rendezvous")
    torch.set_num_threads(1)
    with (Path(folder) / f"stacks-{rank}").open("w") as stacks:
        faulthandler.dump_traceback_later(timeout, file=stacks, exit=True)
        try:
            end.send((time.monotonic(), None, pickle.dumps(fn(rank, world_size, *args))))
        except BaseException:
            end.send((time.monotonic(), traceback.format_exc(), b""))
        finally:
            faulthandler.cancel_dump_traceback_later()
    end.close()
    # Leaves without atexit handlers: a peer that failed must not hang this rank in gloo's teardown.
    os._exit(0)


def start_session(rank: int, world_size: int, config: NaViLConfig | None = None, **sections: Any) -> Any:
    """A ``Session`` inside ``run_ranks``; ``sections`` are passed to ``tiny_config`` where no config is given.

    May be called several times in one function, each time after closing the one before. Where the config names no
    folder for logs, a watchdog leaves its stacks in the ranks' own.
    """
    from navil_megatron.runtime.session import Launch, Session

    launch = Launch(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        rendezvous_file=Path(f"{os.environ[RENDEZVOUS]}-{next(_sessions)}"),
    )
    config = config or tiny_config(**sections)
    if config.logging.directory == "none":
        logs = dataclasses.replace(config.logging, directory=str(Path(os.environ[RENDEZVOUS]).parent))
        config = dataclasses.replace(config, logging=logs)
    return Session.start(config, launch)


def tiny_config(**sections: Any) -> NaViLConfig:
    """A complete config of a very small run on a CPU.

    Args:
        **sections: For a section's name either the section itself, or a dict of fields to change in the tiny one;
            ``parallel`` also takes the short names tp, pp, vpp, ep, etp, cp.
    """
    base = NaViLConfig(
        model=_tiny_model(),
        data=DataConfig(train_sources=(SourceConfig(index="none"),), tokenizer="none", seq_length=64),
        training=TrainingConfig(train_steps=8, global_batch_size=4),
        precision=PrecisionConfig(type="fp32"),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0),
        checkpoint=CheckpointConfig(directory="none"),
        runtime=RuntimeConfig(device="cpu", collective_timeout_seconds=180, cpu_threads=1),
        logging=LoggingConfig(directory="none", tensorboard=False, progress=False),
    )
    changed = {
        name: _section(getattr(base, name), value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(base, **changed)


def _section(section: Any, fields: dict[str, Any]) -> Any:
    short = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "cp": "context_parallel_size",
    }
    names = short if isinstance(section, ParallelConfig) else {}
    return dataclasses.replace(section, **{names.get(name, name): value for name, value in fields.items()})


def _tiny_model() -> ModelConfig:
    return ModelConfig(
        language=LanguageConfig(
            family="qwen3",
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=8,
            vocab_size=64,
            qk_norm=True,
            init_std=0.2,
        ),
        vision=VisionConfig(num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=2, init_std=0.2),
        special_token_ids=tuple(range(64 - len(SPECIAL_TOKENS), 64)),
    )
