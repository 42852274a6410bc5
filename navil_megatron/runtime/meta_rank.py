"""One rank of any layout without its peers, memory or device: what a dry run builds a model in.

torch's fake process groups know every rank of the world and send nothing, and tensors have shapes and no values. So
megatron-core builds exactly what the rank of a real run would, in a process of its own on any machine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.runtime.mcore_on_cpu import FACTORIES, enable_megatron_core_on_cpu
from navil_megatron.runtime.session import build_process_groups


class _OnMeta(TorchFunctionMode):
    """New tensors are on the meta device, whatever device was asked for.

    ``torch.device("meta")`` as a context would not do: core names its device in many places.
    """

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in FACTORIES:
            kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)


@contextmanager
def groups_without_peers(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[ProcessGroupCollection]:
    """The process groups of a rank, through which nothing is sent."""
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        # Core asks all ranks which parameter groups they have: here each answers as this one.
        with mock.patch.object(torch.distributed, "all_gather_object", _answer_alike):
            yield build_process_groups(parallel)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextmanager
def meta_rank(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[ProcessGroupCollection]:
    """The process groups of a rank; tensors made inside hold nothing.

    For a process that will never train: megatron-core stays in its CPU form.
    """
    enable_megatron_core_on_cpu()
    with groups_without_peers(parallel, rank, world_size) as groups, _OnMeta():
        yield groups


def _answer_alike(found: list[Any], own: Any, group: Any = None) -> None:
    found[:] = [own] * len(found)
