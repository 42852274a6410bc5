"""Transformer Engine's compiled part, ``transformer_engine_torch``, in plain torch: what a Hopper GPU would compute.

It has their names, arguments and enumerations (``test_signatures.py`` holds them against the source package) and their
refusals: layouts, alignments, types, rows. What nobody wrote may be imported and passed around, and raises when called.
"""
