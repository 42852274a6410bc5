"""Packed rows as people look at them."""
