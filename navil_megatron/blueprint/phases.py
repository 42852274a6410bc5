"""Which parameters a phase of the recipe trains, by name (paper, tables 7 and 8; section 2.2 of the specification)."""

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
