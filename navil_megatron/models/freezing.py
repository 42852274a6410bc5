"""Freezes what a phase of the recipe does not train; the table of parameters says what that is."""

from collections.abc import Iterable

from torch import nn

from navil_megatron.blueprint.parameters import is_trainable, parameter_of
from navil_megatron.config.model import ModelConfig


def apply_phase(chunks: Iterable[nn.Module], model: ModelConfig, phase: str) -> None:
    """Freeze what the phase does not train. Must run before the gradient buffers are built."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_trainable(parameter_of(model, name).part, phase))
