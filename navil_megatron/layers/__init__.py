"""NaViL's own building blocks, one idea a file.

Shape letters: s sequence, b micro batch, t packed tokens, h hidden, n query heads, g query groups, d head channels,
f feed-forward width, v vocabulary, e experts, p patches, w encoder width. ``t/tp`` is a tensor-parallel rank's share
of t under sequence parallelism.
"""
