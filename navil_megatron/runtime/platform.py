"""The machine under a rank: its device, its collective backend and its memory counters.

``runtime.device`` of the config decides; nothing here looks for a GPU and silently takes what it finds.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.runtime import RuntimeConfig
from navil_megatron.runtime.upload import Uploader

DEVICES_OF_KERNELS = {"torch": {"cuda", "cpu"}, "transformer_engine": {"cuda"}}
"""``runtime.kernels`` -> the values of ``runtime.device`` where they run."""

_PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "A100": 312}
"""Part of a GPU's name -> dense BF16 at its peak, by NVIDIA's data sheets."""


def require_device_of_kernels(config: RuntimeConfig) -> None:
    """Nothing, if the kernels that the config names run on the device that it names.

    Raises:
        UserError: They do not.
    """
    devices = DEVICES_OF_KERNELS[config.kernels]
    if config.device not in devices:
        needed = " or ".join(f'"{device}"' for device in sorted(devices))
        raise UserError(
            f'runtime.kernels = "{config.kernels}" needs runtime.device = {needed}, found "{config.device}"; set '
            'kernels = "torch"'
        )


def _peak_resident_bytes() -> int:
    """Largest resident set of this process; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What differs between a GPU rank and a CPU rank; everything else in the project is written once."""

    name: Literal["cuda", "cpu"]
    """The config's word for it."""
    device: torch.device
    """Where this rank's tensors live."""
    collective_backend: Literal["nccl", "gloo"]
    """What ``torch.distributed`` talks through."""
    synchronize: Callable[[], None]
    """Waits until everything this rank enqueued is done."""
    upload: Callable[[Any], Callable[[], Any]]
    """Starts to bring a dataclass of host tensors to the device; what it returns gives the same dataclass on the
    device, when the work that is enqueued next needs it. On a CPU nothing moves."""
    stamp: Callable[[], Any]
    """Now, as this rank's work sees it: the clock on a CPU, on a GPU an event behind what is enqueued."""
    seconds_between: Callable[[Any, Any], float]
    """From one stamp to another, after ``synchronize``."""
    peak_memory_bytes: Callable[[], int]
    """Most memory held so far: allocated on the GPU, or resident on a CPU."""
    peak_flops: float | None = None
    """FLOP/s of the GPU at its peak in BF16, where it is known."""

    @classmethod
    def cuda(cls, local_rank: int) -> Self:
        """The GPU with this rank's local number.

        Raises:
            UserError: There is no such GPU.
        """
        if not torch.cuda.is_available():
            raise UserError(
                "runtime.device is 'cuda' but torch finds no usable GPU; "
                "run `navil-megatron doctor`, or set runtime.device='cpu'"
            )
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                "start at most one rank per GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
        return cls(
            name="cuda",
            device=device,
            collective_backend="nccl",
            synchronize=torch.cuda.synchronize,
            upload=Uploader(device).start,
            stamp=_event,
            seconds_between=lambda start, end: start.elapsed_time(end) / 1000,
            peak_memory_bytes=torch.cuda.max_memory_allocated,
            peak_flops=next((1e12 * peak for part, peak in _PEAK_TFLOPS.items() if part in name), None),
        )

    @classmethod
    def cpu(cls) -> Self:
        """This process on the CPU."""
        return cls(
            name="cpu",
            device=torch.device("cpu"),
            collective_backend="gloo",
            synchronize=lambda: None,  # work on a CPU is finished when the call returns
            upload=lambda tree: lambda: tree,
            stamp=time.perf_counter,
            seconds_between=lambda start, end: end - start,
            peak_memory_bytes=_peak_resident_bytes,
        )

    @classmethod
    def from_config(cls, config: RuntimeConfig, local_rank: int) -> Self:
        """The platform that the config names.

        Raises:
            UserError: It is not there, or has no such kernels as the config names.
        """
        require_device_of_kernels(config)
        return cls.cuda(local_rank) if config.device == "cuda" else cls.cpu()
