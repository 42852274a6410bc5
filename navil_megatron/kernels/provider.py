"""The one place where a run's kernels are chosen, by the config and never by what can be imported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from navil_megatron.config.schema import RuntimeConfig
from navil_megatron.kernels.torch_kernels import RMSNorm, segment_attention


@dataclass(frozen=True, slots=True)
class Kernels:
    """What the layers need from a kernel library."""

    rms_norm: Callable[..., Any]
    """Built with (config, hidden_size, eps); honours sequence parallelism."""
    segment_attention: Callable[..., Any]
    """Attention inside packed segments; see ``torch_kernels.segment_attention``."""


TORCH_KERNELS = Kernels(rms_norm=RMSNorm, segment_attention=segment_attention)


def choose_kernels(runtime: RuntimeConfig) -> Kernels:
    """The kernels that ``runtime.kernels`` names."""
    return {"torch": TORCH_KERNELS}[runtime.kernels]
