"""One rank of any layout on a GPU that is not there, without its peers: what a dry run builds, and takes a step on.

torch's fake process groups know every rank of the world and send nothing. megatron-core and our code run as on a GPU,
at any size, on any machine, in a process that will never train.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor

from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.runtime.fake_gpu import GPU, FakeGPU, Observer, ShapesOnly
from navil_megatron.runtime.host_waits import wait
from navil_megatron.runtime.known_values import Gather, KnownValues, gather_alike
from navil_megatron.runtime.mcore_on_cpu import NothingPending, cuda_type_name, owner_of
from navil_megatron.runtime.meta_rank import groups_without_peers
from navil_megatron.runtime.platform import Platform
from navil_megatron.runtime.seeding import seed_rank
from navil_megatron.runtime.session import Session
from navil_megatron.runtime.upload import Uploader


class FakeStream(NothingPending):
    """A stream or an event. Kernels wait for them; the host may not."""

    def synchronize(self, *_: object, **__: object) -> None:
        """The host waits."""
        wait("synchronize() of a stream or an event")

    def __enter__(self) -> Self:
        """As the current stream."""
        return self

    def __exit__(self, *_: object) -> None:
        """No more."""


_STREAM = FakeStream()


def _nothing(*_: object, **__: object) -> None:
    """No driver has to be told."""


def _random_state(*_: object, **__: object) -> Tensor:
    return torch.get_rng_state()


def _set_item(tensor: Tensor, index: Any, value: Any, set_item: Callable[..., None] = Tensor.__setitem__) -> None:
    """As torch does on a GPU, which a number that fills a mask never leaves."""
    mask, *rest = index if isinstance(index, tuple) else (index,)
    is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool and all(part == slice(None) for part in rest)
    if is_mask and isinstance(value, int | float):
        tensor.masked_fill_(mask.reshape(*mask.shape, *(1,) * (tensor.dim() - mask.dim())), value)
    else:
        set_item(tensor, index, value)


_RANDOM = "megatron.core.tensor_parallel.random"
_STAND_INS: tuple[tuple[str, str, Any], ...] = (
    ("torch._C", "_ensureCUDADeviceGuardSet", _nothing),  # ShapesOnly keeps GPUs from C++ already
    ("torch.cuda", "current_device", lambda: GPU.index),
    ("torch.cuda", "set_device", _nothing),
    ("torch.cuda", "synchronize", lambda *_: wait("torch.cuda.synchronize()")),
    ("torch.cuda", "current_stream", lambda *_: _STREAM),
    ("torch.cuda", "default_stream", lambda *_: _STREAM),
    ("torch.cuda", "stream", lambda _: nullcontext()),
    ("torch.cuda", "Stream", FakeStream),
    ("torch.cuda", "Event", FakeStream),
    ("torch.cuda", "is_current_stream_capturing", lambda: False),
    ("torch.cuda", "manual_seed", _nothing),
    ("torch.cuda", "get_rng_state", _random_state),
    ("torch.cuda.random", "get_rng_state", _random_state),
    (_RANDOM, "_get_cuda_rng_state", _random_state),
    (_RANDOM, "_set_cuda_rng_state", _nothing),
    ("torch", "Stream", FakeStream),
    ("torch.accelerator", "current_stream", lambda *_: _STREAM),
    ("torch:Tensor", "cuda", lambda tensor, *_, **options: tensor.to(GPU, **options)),
    ("torch:Tensor", "type", cuda_type_name(Tensor.type)),
    ("torch:Tensor", "record_stream", _nothing),
    ("torch:Tensor", "__setitem__", _set_item),
    ("torch._subclasses.fake_tensor:FakeTensor", "is_cuda", property(lambda tensor: tensor.device == GPU)),
)
"""What asks for a driver, or answers from C++: owner, name and what stands there instead."""


@contextmanager
def fake_rank(
    parallel: ParallelConfig,
    rank: int,
    world_size: int,
    observers: Sequence[Observer] = (),
    gather: Gather = gather_alike,
) -> Iterator[Session]:
    """The session of a rank; tensors made inside hold nothing. ``observers`` see what happens on the device, ``gather``
    says which whole numbers the other ranks have.
    """
    with ExitStack() as stack:
        groups = stack.enter_context(groups_without_peers(parallel, rank, world_size))
        for owner, name, value in _STAND_INS:
            stack.enter_context(mock.patch.object(owner_of(owner), name, value))
        # Autograd's threads would be those of a GPU; and nothing is compiled for one.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        seed_rank(0, groups.pp.rank())
        platform = Platform(
            name="cuda",
            device=GPU,
            collective_backend="nccl",
            synchronize=lambda: wait("a wait for all kernels"),
            upload=Uploader(GPU).start,
            stamp=lambda: None,  # nothing takes time
            seconds_between=lambda start, end: 0.0,
            peak_memory_bytes=lambda: 0,
        )
        alone: Any = None  # no peer to talk to, none to wait for
        stack.enter_context(ShapesOnly())
        stack.enter_context(FakeGPU(observers, KnownValues(gather)))
        yield Session(
            platform=platform,
            parallel=parallel,
            groups=groups,
            rank=rank,
            world_size=world_size,
            local_world_size=world_size,
            timeout=timedelta(0),
            replica=alone,
            watchdog=alone,
        )
