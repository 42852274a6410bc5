"""Samples on disk: tar shards, the index over them, what makes both, and reading at random through it."""
