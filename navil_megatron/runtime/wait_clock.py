"""How long a rank waits for others: the time between the beginning and the end of its collectives.

A slow rank is the last to come, so it waits least, while all others wait for it. Whoever waits longest is not at fault;
whoever waits least is. Every collective of torch, whoever begins it, goes through ``ProcessGroup`` and ``Work.wait``;
both are wrapped for as long as a clock runs.
"""

from collections.abc import Callable
from typing import Any

from torch.distributed import ProcessGroup, Work

from navil_megatron.runtime.platform import Platform

_BEGIN = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base", "all_gather_single"),
    *("allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("reduce_scatter_single", "alltoall", "alltoall_base", "send", "recv", "barrier", "_end_coalescing"),
)
"""Where a collective begins; by names that this torch or another one has."""


class WaitClock:
    """Notes what the collectives of this process take, from its making to ``close``."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._waits: list[tuple[Any, Any]] = []
        self._own: list[tuple[type, str, Any]] = []
        for owner, names in ((ProcessGroup, _BEGIN), (Work, ("wait",))):
            for name in names:
                if function := vars(owner).get(name):
                    self._own.append((owner, name, function))
                    setattr(owner, name, self._timed(function))

    def take(self) -> list[tuple[Any, Any]]:
        """Stamps around each since the last call; ``Platform.seconds_between`` reads them."""
        waits, self._waits = self._waits, []
        return waits

    def close(self) -> None:
        """Leaves torch as it was."""
        for owner, name, function in self._own:
            setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self._platform.stamp()
            try:
                return function(*args, **kwargs)
            finally:
                self._waits.append((start, self._platform.stamp()))

        return call
