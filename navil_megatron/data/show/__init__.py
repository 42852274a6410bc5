"""Packed rows as a picture that a person looks at."""
