"""From shards to packed batches. Knows nothing of models or process groups: ranks arrive as plain integers."""
