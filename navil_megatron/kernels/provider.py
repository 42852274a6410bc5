"""The one place where a run's kernels are chosen, by the config and never by what can be imported."""

from navil_megatron.config.run import NaViLConfig
from navil_megatron.kernels.apex_kernels import require_apex
from navil_megatron.kernels.te_install import require_transformer_engine
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.kernels import Kernels


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
    from navil_megatron.kernels.te_kernels import build_kernels  # cannot be loaded where the engine is not installed

    return build_kernels(config)
