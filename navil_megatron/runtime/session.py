"""A running rank: its process groups, its place in the layout, its seeds and the wish to stop.

Built on megatron-core's ``parallel_state``; on a CPU the seam of ``mcore_on_cpu`` comes first. Order of ranks is core's
default ``tp-cp-ep-dp-pp``: tensor-parallel neighbours sit side by side, pipeline stages far apart.
"""

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from navil_megatron.config.errors import UserError
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.runtime.logs import configure_logging
from navil_megatron.runtime.mcore_on_cpu import enable_megatron_core_on_cpu
from navil_megatron.runtime.platform import Platform
from navil_megatron.runtime.seeding import seed_rank
from navil_megatron.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKEND_MARGIN_SECONDS = 30
"""The backend gives up on a collective this much later than the watchdog, which can tell who is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How this process was started: which rank of how many, and where the ranks meet."""

    rank: int = 0
    """Number of this process among all."""
    world_size: int = 1
    local_rank: int = 0
    """Number of this process on its machine."""
    local_world_size: int = 1
    """Processes on this machine."""
    rendezvous_file: Path | None = None
    """File through which the ranks meet; ``None``: torchrun's address, or no meeting for a single process."""

    @classmethod
    def from_environment(cls) -> Self:
        """What torchrun set, or one process that stands alone."""
        names = ("rank", "world_size", "local_rank", "local_world_size")
        found: dict[str, Any] = {name: int(os.environ[name.upper()]) for name in names if name.upper() in os.environ}
        return cls(**found)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the model that a world of this size holds.

    Raises:
        UserError: The layout does not fit the number of ranks.
    """
    if world_size % parallel.model_parallel_size:
        raise UserError(
            f"{world_size} ranks do not fit the layout: tensor {parallel.tensor_model_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} needs a multiple of "
            f"{parallel.model_parallel_size} ranks; change torchrun's --nproc-per-node or the [parallel] section"
        )
    if world_size % parallel.expert_ranks:
        raise UserError(
            f"{world_size} ranks do not fit the layout: expert tensor {parallel.expert_tensor_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x expert {parallel.expert_model_parallel_size} needs a multiple "
            f"of {parallel.expert_ranks} ranks; change torchrun's --nproc-per-node or the [parallel] section"
        )
    return world_size // parallel.model_parallel_size


@dataclass(slots=True)
class Session:
    """One rank of a run, from ``Session.start`` to ``close``; also a context manager."""

    platform: Platform
    parallel: ParallelConfig
    groups: ProcessGroupCollection
    """megatron-core's process groups, each with this rank's place in it and its size: ``groups.tp`` the tensor-parallel
    ranks, ``pp`` the pipeline stages, ``cp`` and ``ep`` the context- and expert-parallel ranks. The place in ``dp``,
    context parallelism not counted, says which replica of the model this is, and so its data.
    """
    rank: int
    world_size: int
    local_world_size: int
    """Ranks of this rank's node."""
    timeout: timedelta
    """When the backend gives up on a collective."""
    replica: ProcessGroup
    """The ranks of this rank's replica of the model, talking on the host."""
    watchdog: Watchdog
    """Ends the run when ranks wait for one another too long."""
    _stop_signal: int | None = None
    _handlers: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, config: NaViLConfig, launch: Launch | None = None) -> Self:
        """Joins the other ranks, builds the process groups, seeds the generators and listens for a stop signal.

        Raises:
            UserError: The layout does not fit the number of ranks, or the device is not there.
        """
        launch = launch or Launch.from_environment()
        parallel = config.parallel
        data_parallel_size(parallel, launch.world_size)
        configure_logging(launch.rank, launch.world_size)
        platform = Platform.from_config(config.runtime, launch.local_rank)
        if platform.name == "cpu":
            enable_megatron_core_on_cpu()
            torch.set_num_threads(_cpu_threads(config, launch))
        timeout = timedelta(seconds=config.runtime.collective_timeout_seconds + _BACKEND_MARGIN_SECONDS)
        _join(platform, launch, timeout)
        groups = build_process_groups(parallel, timeout.total_seconds() / 60)
        seed_rank(config.training.seed, groups.pp.rank())
        watchdog = Watchdog(
            groups.pp.rank(),
            config.runtime.collective_timeout_seconds,
            Path(config.logging.directory),
            one_machine=launch.local_world_size == launch.world_size,
        )
        session = cls(
            platform=platform,
            parallel=parallel,
            groups=groups,
            rank=launch.rank,
            world_size=launch.world_size,
            local_world_size=launch.local_world_size,
            timeout=timeout,
            replica=_replica_group(groups, platform, timeout),
            watchdog=watchdog,
        )
        for number in _STOP_SIGNALS:
            session._handlers[number] = signal.signal(number, session._note_stop)
        axes = (groups.tp, groups.pp, groups.cp, groups.ep, groups.dp)
        ranks = "%d ranks on %s: tensor %d, pipeline %d, context %d, expert %d, data %d"
        logger.info(ranks, launch.world_size, platform.name, *(group.size() for group in axes))
        return session

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors live."""
        return self.platform.device

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank's pipeline stage reads pixels and tokens."""
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's pipeline stage computes the loss."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    def together[T](self, make: Callable[[], T]) -> T:
        """What ``make`` gives, if it succeeds on every rank; every rank calls this at the same point.

        A rank that cannot go on would leave the others waiting in a collective. So the first rank's problem becomes
        everybody's: rank 0 raises it and the others leave with the same exit code, without a word.

        Raises:
            UserError: ``make`` raised one on some rank.
        """
        problem, made = None, None
        try:
            made = make()
        except UserError as error:
            problem = error
        problems: list[UserError | None] = [None] * self.world_size
        torch.distributed.all_gather_object(problems, problem)
        first = next((found for found in problems if found is not None), None)
        if first is not None:
            raise first if self.is_main else SystemExit(first.exit_code)
        return made  # type: ignore[return-value]

    def host_group(self) -> ProcessGroup:
        """A new group of all ranks that moves host memory and is nobody else's: a thread may use it beside the step.

        Every rank must call it at the same point.
        """
        group = torch.distributed.new_group(backend="gloo", timeout=self.timeout)
        assert isinstance(group, ProcessGroup)
        return group

    def first_in_replica(self, flags: np.ndarray) -> np.ndarray:
        """[n] int: the first rank of the replica that gave true, -1: none did; each gives [n] at the same point."""
        first = np.where(flags, self.rank, self.world_size).astype(np.int32)
        if self.replica.size() > 1:
            torch.distributed.all_reduce(torch.from_numpy(first), op=torch.distributed.ReduceOp.MIN, group=self.replica)
        return np.where(first == self.world_size, -1, first)

    def stop_asked(self) -> bool:
        """Whether any rank was asked to stop (SIGTERM or SIGINT). Every rank must call it at the same point."""
        return self.on_any_rank(self._stop_signal is not None)

    def on_any_rank(self, is_so: bool) -> bool:
        """Whether something is so on any rank. Every rank must call it at the same point."""
        flag = torch.tensor([int(is_so)], dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether it was this very rank that got a signal to stop."""
        return self._stop_signal is not None

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        """Asks for a stop after the current step; a second Ctrl-C acts at once.

        SIGTERM may come twice for one wish: from the scheduler to all processes, and through torchrun.
        """
        self._stop_signal = number
        if number == signal.SIGINT:
            signal.signal(number, self._handlers[number] or signal.SIG_DFL)

    def close(self) -> None:
        """Leaves the process groups and gives the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        self.watchdog.close()
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def __enter__(self) -> Self:
        """The started session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it; after an error the other ranks learn that this one leaves."""
        if error is not None:
            self.watchdog.leave(error)
        self.close()


def build_process_groups(parallel: ParallelConfig, timeout_minutes: float = 30) -> ProcessGroupCollection:
    """megatron-core's process groups of a layout, inside the default group."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def _replica_group(groups: ProcessGroupCollection, platform: Platform, timeout: timedelta) -> ProcessGroup:
    """The ranks that hold one replica and share its rows; a group that moves host memory, for a step must not wait for
    the GPU to learn a few bits. Megatron-core has such a group only without context parallelism.
    """
    if platform.name == "cpu" and groups.cp.size() == 1:
        return groups.mp
    replicas: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(replicas, groups.dp.rank())
    members = [[rank for rank, found in enumerate(replicas) if found == replica] for replica in sorted(set(replicas))]
    mine, _ = torch.distributed.new_subgroups_by_enumeration(members, timeout, backend="gloo")
    assert isinstance(mine, ProcessGroup)
    return mine


def _cpu_threads(config: NaViLConfig, launch: Launch) -> int:
    """The configured threads, or this machine's cores shared evenly by its ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.runtime.cpu_threads or max(1, cores // launch.local_world_size)


def _join(platform: Platform, launch: Launch, timeout: timedelta) -> None:
    """Opens the default process group: by file, by torchrun's address, or alone."""
    place: dict[str, Any] = {}
    if launch.rendezvous_file is not None:
        place = {"init_method": f"file://{launch.rendezvous_file}"}
    elif launch.world_size == 1:
        place = {"store": torch.distributed.HashStore()}
    torch.distributed.init_process_group(
        platform.collective_backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout, **place
    )
