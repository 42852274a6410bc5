"""Megatron-core's sharded checkpoints read and written by one plain process, without ranks."""
