"""How close is equal: the one table of tolerances. No test loosens or repeats an entry; a new need is a new entry."""

GOLDEN = {"atol": 2e-4, "rtol": 1e-4}
"""Activations, logits and losses against the golden files (fp32, another implementation's order of sums)."""

GOLDEN_GRADIENT = {"atol": 5e-5, "rtol": 2e-3}
"""Gradients against the golden files."""

RANKS = {"rtol": 1e-5, "atol": 1e-6}
"""Any layout against one rank (fp32): only the order of sums differs."""

EXPORT = {"rtol": 0.0, "atol": 1e-4}
"""Mean held-out loss of the exported folder under transformers against the engine's (fp32, the same weights)."""

RESTORED = {"rtol": 1e-6, "atol": 1e-6}
"""Losses and weights after a restore at another layout against going straight on (fp32)."""

LLM_PEER = {"rtol": 0.0, "atol": 1e-4}
"""Text-only logits against transformers' own model of the LLM that a start came from (fp32, weights of std 0.2)."""

DALI_PIXELS = 2
"""Steps of 255 between a patch decoded and resized by DALI and torch and the reference's: each rounds on its own."""

BF16_LOGITS = 0.05
"""Relative L2 distance of the bf16 logits of a tiny random model from its fp32 logits: each value is rounded to 2^-9
some hundred times on its way, and roundings add up as their square root."""
