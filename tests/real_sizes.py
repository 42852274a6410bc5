"""The models of the paper at their real sizes (tables 6 to 8); nothing here is ever built, only counted and named."""

from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.vision import VisionConfig

NAVIL_2B = ModelConfig(
    language=LanguageConfig(
        family="internlm2",
        num_layers=24,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=16,
        num_query_groups=8,
        head_dim=128,
        vocab_size=92_556,
        qk_norm=False,
        composed_visual_output_projection=True,
    ),
    vision=VisionConfig(num_layers=24, hidden_size=1472, ffn_hidden_size=5888, num_attention_heads=23),
    special_token_ids=tuple(range(92_544, 92_556)),
)
"""The base model's 92,544 tokens, and the 12 special ones behind them."""

NAVIL_9B = ModelConfig(
    language=LanguageConfig(
        family="qwen3",
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12_288,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=151_936,
        qk_norm=True,
    ),
    vision=VisionConfig(num_layers=32, hidden_size=1792, ffn_hidden_size=7168, num_attention_heads=28),
    special_token_ids=tuple(range(151_924, 151_936)),
)
"""The special tokens fit inside the base model's padded table."""
