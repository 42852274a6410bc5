"""Freezes what a phase of the recipe does not train; ``config.phases`` says what that is."""

from collections.abc import Iterable

from torch import nn

from navil_megatron.blueprint.phases import is_trainable


def apply_phase(chunks: Iterable[nn.Module], phase: str) -> None:
    """Freeze what the phase does not train. Must run before the gradient buffers are built."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_trainable(name, phase))
