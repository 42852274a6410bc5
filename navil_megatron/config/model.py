"""``[model]``: encoder, connector and decoder, and the special tokens."""

from dataclasses import dataclass

from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.vision import VisionConfig

SPECIAL_TOKENS = (
    "</box>",
    "<box>",
    "<IMG_CONTEXT>",
    "</img>",
    "<img>",
    "</quad>",
    "<quad>",
    "</ref>",
    "<ref>",
    "<img_uncond>",
    "<IMG_LINE_BREAK>",
    "<IMG_FRAME_BREAK>",
)
"""The 12 special tokens in the row order of the special-token embedding (reference: SPECIAL_TOKEN_LIST)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A NaViL model. Everything that decides the weights' shapes or the function they compute."""

    language: LanguageConfig
    """The decoder with modality experts."""
    vision: VisionConfig
    """The visual encoder."""
    special_token_ids: tuple[int, ...]
    """Token ids of the 12 special tokens, in the order of ``SPECIAL_TOKENS``."""
    connector_norm_epsilon: float = 1e-5
    """Epsilon of the connector's LayerNorm."""

    def special_token_id(self, token: str) -> int:
        """The id of one of ``SPECIAL_TOKENS``, e.g. ``"<IMG_CONTEXT>"``."""
        return self.special_token_ids[SPECIAL_TOKENS.index(token)]
