"""Which parameters a phase of the recipe trains (paper, tables 7 and 8; section 2.2 of the specification)."""

from collections.abc import Iterable

from torch import nn

VISUAL_PARTS = ("vision_encoder.", "connector.", "special_token_embedding.")


def is_trainable(name: str, phase: str) -> bool:
    """Whether ``phase`` trains the parameter.

    ``s1.1``: encoder, connector, special tokens and visual experts (attention and feed-forward, and the visual query
    and key norms). ``s1.2``: the text parameters of self-attention too. ``s2``: everything. The shared norms, the text
    feed-forward, the embedding table and the LM head wait for ``s2``.
    """
    if phase == "s2" or name.startswith(VISUAL_PARTS) or ".visual." in name:
        return True
    return phase == "s1.2" and ".self_attention." in name


def apply_phase(chunks: Iterable[nn.Module], phase: str) -> None:
    """Freeze what the phase does not train. Must run before the gradient buffers are built."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_trainable(name, phase))
