"""What a sample costs to train on, in forward FLOPs: the measure by which rows are dealt to ranks.

Integers, so that every machine deals alike. A multiply-add is 2; causal attention takes half of a segment's square.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from navil_megatron.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class CostModel:
    """FLOPs by what they grow with."""

    token: int
    """A token of the decoder."""
    text_token: int
    """What a text token adds: the output layer."""
    token_pair: int
    """A token of a segment with one token of the segment."""
    patch: int
    """A patch of the encoder, its share of the connector included."""
    patch_pair: int
    """A patch of a scale image with one patch of it."""

    @classmethod
    def from_config(cls, model: ModelConfig) -> Self:
        """The costs of a model."""
        language, vision = model.language, model.vision
        query = language.num_attention_heads * language.head_dim
        key_value = 2 * language.num_query_groups * language.head_dim
        attention = language.hidden_size * (2 * query + key_value)
        feed_forward = language.feed_forward_weights_per_token
        width = vision.hidden_size
        encoder = width * (vision.patch_dim + vision.num_layers * (4 * width + 2 * vision.ffn_hidden_size))
        connector = language.hidden_size * (vision.merged_size + language.hidden_size) // vision.merge_size**2
        return cls(
            token=2 * language.num_layers * (attention + feed_forward),
            text_token=2 * language.hidden_size * language.vocab_size,
            token_pair=2 * language.num_layers * query,
            patch=2 * (encoder + connector),
            patch_pair=4 * vision.num_layers * width,
        )

    def samples(
        self, num_text: np.ndarray, num_visual: np.ndarray, patches: np.ndarray, patch_pairs: np.ndarray
    ) -> np.ndarray:
        """[n] int64: FLOPs of samples, each one attention segment; all arguments [n] int64."""
        tokens = num_text + num_visual
        decoder = self.token * tokens + self.text_token * num_text + self.token_pair * tokens**2
        return decoder + self.patch * patches + self.patch_pair * patch_pairs
