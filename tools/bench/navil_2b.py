"""NaViL-2B at its real sizes (paper, tables 6 to 8), and a run of it: nothing here is built, only counted."""

from typing import Any

from navil_megatron.config.load import config_from_dict, config_to_dict
from navil_megatron.config.schema import LanguageConfig, ModelConfig, NaViLConfig, VisionConfig

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


def navil_2b_run(**data: Any) -> NaViLConfig:
    """A run of NaViL-2B with these settings of its data section."""
    sections = {
        "model": config_to_dict(NAVIL_2B),
        "data": {"train_sources": [{"index": "none"}], "tokenizer": "none", **data},
        "training": {"train_steps": 1, "global_batch_size": 1},
        "optimizer": {"lr": 5e-5},
        "checkpoint": {"directory": "none"},
        "runtime": {"device": "cuda"},
        "logging": {"directory": "none"},
    }
    return config_from_dict(sections, "the benchmark")
