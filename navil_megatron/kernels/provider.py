"""The one place where a run's kernels are chosen, by the config and never by what can be imported."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from navil_megatron.config.run import NaViLConfig
from navil_megatron.kernels.apex_kernels import require_apex
from navil_megatron.kernels.te_install import require_transformer_engine
from navil_megatron.kernels.torch_kernels import Linear, RMSNorm, segment_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What the layers need from a kernel library."""

    rms_norm: Callable[..., Any]
    """Built with (config, hidden_size, eps); honours sequence parallelism."""
    segment_attention: Callable[..., Any]
    """Attention inside packed segments; see ``torch_kernels.segment_attention``."""
    linear: Callable[..., nn.Module]
    """Built with (input size, output size, bias=, dtype=): ``weight`` [out, in] and, if asked for, ``bias`` [out]."""
    encoder_norms: Mapping[str, Callable[..., nn.Module]]
    """The encoder's norms by their name in the config, built with (size, eps=, dtype=)."""
    modality_product: Callable[..., Any] | None = None
    """Text and visual rows through a ``linear`` each; ``None``: the layers' own, with its overlapped collectives."""
    adam: type | None = None
    """The optimizer that core shall use; ``None``: ``training.adamw``, which keeps its state in the same way."""
    encoder_precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered around each layer of the encoder. The decoder's layers are entered by megatron-core."""
    encoder_rows: int = 1
    """The encoder's patches are padded to a multiple of this."""


TORCH_KERNELS = Kernels(
    rms_norm=RMSNorm,
    segment_attention=segment_attention,
    linear=Linear,
    encoder_norms={"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm},
)


def choose_kernels(config: NaViLConfig) -> Kernels:
    """The kernels that ``runtime.kernels`` names.

    Raises:
        UserError: They, or what the config asks of them, cannot run on this machine.
    """
    if config.runtime.gradient_accumulation_fusion == "apex":
        require_apex()
    if config.runtime.kernels == "torch":
        return TORCH_KERNELS
    require_transformer_engine(config.precision.fp8)
    # Imported by name: the module cannot be loaded where Transformer Engine is not installed.
    kernels: Kernels = import_module("navil_megatron.kernels.te_kernels").build_kernels(config)
    return kernels
