"""The one seam that lets megatron-core run on CPU ranks over gloo, so every layout is provable without a GPU.

megatron-core calls ``torch.cuda`` and writes ``device="cuda"`` in about 40 places. ``PATCHES`` lists every name that is
replaced and why; ``enable_megatron_core_on_cpu`` puts them in place once per process. Nothing here runs on CUDA.
"""

import functools
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.package_info import __shortversion__ as megatron_core_version

from navil_megatron.runtime.core_import import stay_eager

TESTED_MEGATRON_CORE = "0.19."
"""Releases whose call sites this seam was checked against."""

_CPU = torch.device("cpu")
_enabled = False


@dataclass(frozen=True, slots=True)
class Patch:
    """One name of torch or megatron-core that gets a CPU meaning."""

    owner: str
    """Module that holds the name, or ``module:class``."""
    name: str
    """The attribute."""
    build: Callable[[Any], Any]
    """Makes the replacement from the original."""
    reason: str
    """Who in megatron-core needs it."""


def _no_op(*args: object, **kwargs: object) -> None:
    """A CPU has nothing to do here."""


class NothingPending:
    """Stands for a CUDA stream or event: every operation has finished when its call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Takes what either takes."""

    wait_stream = wait_event = wait = record = synchronize = _no_op

    def record_event(self, event: object = None) -> "NothingPending":
        """A point that has already passed."""
        return self

    def query(self) -> bool:
        """The work before the event is done."""
        return True


_THE_STREAM = NothingPending()


def _is_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The same factory, for which ``device="cuda"`` means the CPU."""

    @functools.wraps(factory)
    def build_tensor(*args: Any, **kwargs: Any) -> Any:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return build_tensor


def _same(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _stay(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """``Tensor.cuda``: the tensor is already where the rank computes."""
    return tensor


def cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type()`` names tensors as on a GPU, because the optimizers compare names."""

    @functools.wraps(original)
    def tensor_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = original(tensor, *args, **kwargs)
        if isinstance(named, str) and not named.startswith("torch.cuda."):
            return named.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
        return named

    return tensor_type


def _get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Split sizes for an all-to-all: core expects NumPy, which it only makes of GPU tensors."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_uneven(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Core's all-gather along the rows, where gloo wants shares of one size: pad, gather, cut the padding out."""

    @functools.wraps(original)
    def gather(
        rows: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(rows, group, output_split_sizes, use_global_buffer)
        longest = max(*output_split_sizes, 1)
        shares = original(_pad_rows(rows, longest), group).chunk(group.size())
        return torch.cat([share[:size] for share, size in zip(shares, output_split_sizes, strict=True)])

    return gather


def _reduce_scatter_uneven(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Core's reduce-scatter along the rows, the same way."""

    @functools.wraps(original)
    def reduce_scatter(
        rows: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(rows, group, input_split_sizes, use_global_buffer)
        longest = max(*input_split_sizes, 1)
        padded = torch.cat([_pad_rows(share, longest) for share in rows.split(input_split_sizes)])
        return original(padded, group)[: input_split_sizes[group.rank()]]

    return reduce_scatter


def _pad_rows(rows: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(length - rows.shape[0], *rows.shape[1:])])


_FILLED = ("empty", "zeros", "ones", "full")
FACTORIES = (*_FILLED, *(f"{name}_like" for name in _FILLED), "tensor", "arange", "rand", "randn", "randint")
"""Functions that make tensors."""

_RANDOM = "megatron.core.tensor_parallel.random"
_MAPPINGS = "megatron.core.tensor_parallel.mappings"
_MOE = "megatron.core.transformer.moe"

PATCHES: tuple[Patch, ...] = (
    Patch("torch.cuda", "current_device", _same(lambda: _CPU), "device= of buffers in layers, mappings, DDP, p2p"),
    Patch("torch.cuda", "set_device", _same(_no_op), "checkpoint workers choose a device"),
    Patch("torch.cuda", "synchronize", _same(_no_op), "p2p, timers, checkpoint save"),
    Patch("torch.cuda", "current_stream", _same(lambda *_: _THE_STREAM), "gradient buckets, MoE dispatch"),
    Patch("torch.cuda", "default_stream", _same(lambda *_: _THE_STREAM), "side streams wait on it"),
    Patch("torch.cuda", "Stream", _same(NothingPending), "MoE dispatch makes a copy stream"),
    Patch("torch.cuda", "Event", _same(NothingPending), "MoE layers record events"),
    Patch("torch.cuda", "stream", _same(lambda stream: nullcontext()), "MoE dispatch copies inside a stream"),
    Patch("torch.cuda", "empty_cache", _same(_no_op), "DDP frees buffers"),
    Patch("torch.cuda", "is_current_stream_capturing", _same(lambda: False), "MoE dispatch, CUDA graphs"),
    Patch("torch.cuda", "get_rng_state", _same(_get_rng_state), "RNG tracker, rerun state machine"),
    Patch("torch.cuda", "set_rng_state", _same(_set_rng_state), "rerun state machine"),
    Patch("torch.cuda", "manual_seed", _same(torch.manual_seed), "model_parallel_cuda_manual_seed"),
    Patch("torch.cuda.random", "get_rng_state", _same(_get_rng_state), "recompute saves the state"),
    Patch("torch:Tensor", "cuda", _same(_stay), "optimizer state gather, checkpoint exchange, tied embeddings"),
    Patch("torch:Tensor", "type", cuda_type_name, "optimizers compare with 'torch.cuda.FloatTensor'"),
    Patch(_RANDOM, "_get_cuda_rng_state", _same(_get_rng_state), "RNG tracker and recompute"),
    Patch(_RANDOM, "_set_cuda_rng_state", _same(_set_rng_state), "RNG tracker and recompute"),
    Patch(f"{_MOE}.moe_utils", "maybe_move_tensor_to_cpu", _same(_to_host), "all-to-all splits"),
    Patch(f"{_MOE}.token_dispatcher", "maybe_move_tensor_to_cpu", _same(_to_host), "imports it by name"),
    Patch(_MAPPINGS, "_gather_along_first_dim", _gather_uneven, "experts under tensor parallelism: gloo is even"),
    Patch(_MAPPINGS, "_reduce_scatter_along_first_dim", _reduce_scatter_uneven, "experts under tensor parallelism"),
    *(Patch("torch", name, _on_cpu, "device='cuda' literals in optimizers, schedules, MoE") for name in FACTORIES),
)
"""Everything that is replaced. A global ``TorchFunctionMode`` would catch more, at a cost on every single operation."""


def require_tested_megatron_core(version: str = megatron_core_version) -> None:
    """Refuses a megatron-core whose call sites nobody has checked.

    Raises:
        RuntimeError: Another release line is installed.
    """
    if not version.startswith(TESTED_MEGATRON_CORE):
        raise RuntimeError(
            f"megatron-core {version} was not tested on CPU ranks (tested: {TESTED_MEGATRON_CORE}x); "
            "install 'megatron-core>=0.19.2,<0.20' or run on CUDA"
        )


def owner_of(path: str) -> Any:
    """The module, or the class after a colon, that a path names."""
    module, _, attribute = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def enable_megatron_core_on_cpu() -> None:
    """Puts every patch in place; a second call changes nothing.

    Raises:
        RuntimeError: megatron-core is of an untested release line.
    """
    global _enabled
    if _enabled:
        return
    require_tested_megatron_core()
    stay_eager()
    for patch in PATCHES:
        owner = owner_of(patch.owner)
        setattr(owner, patch.name, patch.build(getattr(owner, patch.name)))
    _enabled = True
