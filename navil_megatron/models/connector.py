"""The connector: LayerNorm, then a two-layer GELU MLP from pixel-shuffled encoder tokens to the decoder's width."""

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from navil_megatron.config.model import ModelConfig


class Connector(MegatronModule):
    """[m, w * merge^2] -> [m, h]."""

    def __init__(self, model: ModelConfig, config: TransformerConfig):
        super().__init__(config=config)
        merged, hidden, dtype = model.vision.merged_size, model.language.hidden_size, config.params_dtype
        self.norm = nn.LayerNorm(merged, eps=model.connector_norm_epsilon, dtype=dtype)
        self.linear_fc1 = nn.Linear(merged, hidden, dtype=dtype)
        self.linear_fc2 = nn.Linear(hidden, hidden, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project each merged token."""
        return self.linear_fc2(nn.functional.gelu(self.linear_fc1(self.norm(tokens))))
