"""Pretrained language models: their families, and how one becomes a NaViL."""
