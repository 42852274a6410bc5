"""``[runtime]``: the machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.modality import Sublayer
from navil_megatron.config.numbers import Count


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Where the run executes."""

    device: Literal["cuda", "cpu"]
    """``cuda`` with NCCL, or ``cpu`` with gloo. Never guessed."""
    kernels: Literal["torch", "transformer_engine"] = "torch"
    """Which arithmetic the layers use: ``torch`` runs on both devices, ``transformer_engine`` on ``cuda``. Weights and
    checkpoints are the same, so a run may change it on resume."""
    gradient_accumulation_fusion: Literal["none", "apex", "transformer_engine"] = "none"
    """What adds weight gradients to the FP32 sums inside the matrix product: ``transformer_engine`` in the linear
    layers of those kernels, ``apex`` in the LM head, where torch's own product does so otherwise."""
    collective_timeout_seconds: Count = 600
    """A collective that does not come back within this time ends the run."""
    check_replicas_every_steps: Count | None = 1_000
    """Steps between comparisons of the weights of all data-parallel replicas, bit for bit, also after the last step: a
    machine that computes wrongly without a word is named, and the run ends with exit code 5. ``None``: never."""
    cpu_threads: Count | None = None
    """Threads of one CPU rank; ``None``: cores divided by local ranks."""


def runtime_rules(runtime: RuntimeConfig, language: LanguageConfig) -> Iterator[str]:
    """One line for every rule about kernels that the run breaks."""
    engine = runtime.kernels == "transformer_engine"
    fusion = runtime.gradient_accumulation_fusion
    if fusion == "transformer_engine" and not engine:
        yield (
            f'runtime.gradient_accumulation_fusion = "{fusion}", but runtime.kernels = "{runtime.kernels}" has no such '
            'layers; set kernels = "transformer_engine" or the fusion to "none"'
        )
    if fusion == "apex" and runtime.device != "cuda":
        yield (
            f'runtime.gradient_accumulation_fusion = "apex" needs runtime.device = "cuda", found "{runtime.device}"; '
            'set it to "none"'
        )
    if runtime.kernels != "torch" and any(language.shares(sublayer) for sublayer in get_args(Sublayer)):
        yield (
            f"model.language.modality_experts = {list(language.modality_experts)} shares weights between modalities, "
            f'which only runtime.kernels = "torch" does, found "{runtime.kernels}"; change one of the two'
        )
