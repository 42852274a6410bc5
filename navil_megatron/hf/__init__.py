"""Hugging Face in and out: one plain process, whole tensors, no model code of the training side."""
