"""A small run that is valid, as the tables of a TOML file, for tests that break one thing at a time."""

import tomllib
from typing import Any

EXAMPLE_TOML = """
[model]
special_token_ids = [84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95]

[model.language]
family = "qwen3"
num_layers = 4
hidden_size = 32
ffn_hidden_size = 64
num_attention_heads = 4
num_query_groups = 2
head_dim = 8
vocab_size = 96
qk_norm = true

[model.vision]
num_layers = 2
hidden_size = 24
ffn_hidden_size = 48
num_attention_heads = 3

[data]
train_sources = [{ index = "shards/train.index" }]
tokenizer = "tokenizer"
seq_length = 2048

[training]
train_steps = 1000
global_batch_size = 8

[optimizer]
lr = 1e-3

[checkpoint]
directory = "runs/example/checkpoints"

[runtime]
device = "cpu"

[logging]
directory = "runs/example/logs"
"""


def example_tables() -> dict[str, Any]:
    """A fresh copy of the tables."""
    return tomllib.loads(EXAMPLE_TOML)
