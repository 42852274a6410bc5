"""``[model]``: encoder, connector and decoder, and the special tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

from navil_megatron.config.language import LanguageConfig, language_rules
from navil_megatron.config.numbers import Positive
from navil_megatron.config.vision import VisionConfig, vision_rules

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
    connector_norm_epsilon: Positive = 1e-5
    """Epsilon of the connector's LayerNorm."""

    def special_token_id(self, token: str) -> int:
        """The id of one of ``SPECIAL_TOKENS``, e.g. ``"<IMG_CONTEXT>"``."""
        return self.special_token_ids[SPECIAL_TOKENS.index(token)]


def model_rules(model: ModelConfig) -> Iterator[str]:
    """One line for every rule that the model breaks, whatever the run."""
    yield from language_rules(model.language)
    yield from vision_rules(model.vision)
    ids, vocab_size = model.special_token_ids, model.language.vocab_size
    names = ", ".join(SPECIAL_TOKENS)
    if len(ids) != len(SPECIAL_TOKENS):
        yield f"model.special_token_ids holds {len(ids)} ids, expected {len(SPECIAL_TOKENS)}, one for each of {names}"
    for token_id in sorted({token_id for token_id in ids if ids.count(token_id) > 1}):
        yield f"model.special_token_ids holds {token_id} more than once; give every special token an id of its own"
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            yield (
                f"model.special_token_ids holds {token_id}, outside model.language.vocab_size = {vocab_size}; "
                "the vocabulary includes the special tokens"
            )
