"""Counts what one rank sends, beneath ``torch.distributed``: every collective passes torch's dispatcher as a c10d
operation, also those that megatron-core bound to names of its own at import or coalesces.

Bytes are payload: the tensor as a whole. Input of an all-reduce, output of an all-gather, input of a reduce-scatter,
what is sent of an all-to-all or of a message to a neighbour. How much crosses a wire depends on the algorithm beneath
(a ring all-reduce of n ranks moves 2 (n - 1) / n of the payload).
"""

from collections import defaultdict
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from navil_megatron.planner.communication import Traffic, TrafficTable

AXES = {
    "tp": ("tp", "expt_tp"),
    "cp": ("cp", "tp_cp"),
    "pp": ("pp",),
    "ep": ("ep", "tp_ep"),
    "embd": ("embd",),
    "dp": ("dp", "dp_cp", "intra_dp_cp"),
    "expert dp": ("expt_dp", "intra_expt_dp"),
    "replica": ("mp", "tp_ep_pp", "tp_ep_pp_with_egtp_remat"),
    "world": ("intra_dist_opt",),
}
"""Axis -> fields of megatron-core's collection of groups. Groups of the same ranks are objects of their own."""

COLLECTIVES = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
}
"""c10d operation -> the word of the tables."""

INPUT_SECOND = ("reduce-scatter", "all-to-all")
"""Operations whose first argument is the output and whose payload is the second; else it is the first."""

NOT_COUNTED = ("recv_", "barrier")
"""A receive is the other side of a send; a barrier carries nothing."""


class CountTraffic(TorchDispatchMode):
    """While entered, counts the traffic of this rank; a group of one rank sends nothing and is left out."""

    def __init__(self, groups: ProcessGroupCollection):
        super().__init__()
        self.found: TrafficTable = defaultdict(Traffic)
        self._axis_of = {torch.distributed.group.WORLD.group_name: "world"}
        for axis, names in AXES.items():
            for name in names:
                group = getattr(groups, name, None)
                if isinstance(group, ProcessGroup):
                    self._axis_of[group.group_name] = axis

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self._note(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple) -> None:
        if name in NOT_COUNTED:
            return
        group = next(ProcessGroup.unbox(arg) for arg in args if _is_group(arg))
        if group.size() == 1:
            return
        # An operation that is not in the table must not go uncounted.
        collective = COLLECTIVES[name]
        # Overlapped messages between two stages go one way over the default group, so that they do not wait.
        axis = "pp" if collective == "send" else self._axis_of[group.group_name]
        payload = args[1] if collective in INPUT_SECOND else args[0]
        self.found[axis, collective] += Traffic(1, _num_bytes(payload))


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_num_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
