"""NaViL pretraining on megatron-core: one model, every layout, from shards to a Hugging Face folder."""

__version__ = "0.1.0"
