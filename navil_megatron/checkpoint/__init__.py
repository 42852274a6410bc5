"""State on disk: megatron-core sharded checkpoints that are whole or not there, restored bit for bit."""
