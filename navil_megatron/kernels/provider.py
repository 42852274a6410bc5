"""The one place where a run's kernels are chosen, by the config and never by what can be imported."""

from dataclasses import replace

from navil_megatron.config.run import NaViLConfig
from navil_megatron.kernels import flash_attention
from navil_megatron.kernels.apex_kernels import with_apex
from navil_megatron.kernels.te_install import require_transformer_engine
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.kernels import Kernels


def choose_kernels(config: NaViLConfig) -> Kernels:
    """The kernels that ``runtime.kernels`` names.

    Raises:
        UserError: They, or what the config asks of them, cannot run on this machine.
    """
    kernels = TORCH_KERNELS
    if config.runtime.kernels == "transformer_engine":
        require_transformer_engine(config.precision.fp8)
        from navil_megatron.kernels.te_kernels import build_kernels  # cannot be loaded where it is not installed

        kernels = build_kernels(config)
    elif config.runtime.device == "cuda" and config.precision.type == "bf16":
        flash_attention.require_flash_attention()
        kernels = replace(kernels, segment_attention=flash_attention.segment_attention)
    return with_apex(kernels) if config.runtime.gradient_accumulation_fusion == "apex" else kernels
