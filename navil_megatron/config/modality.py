"""The two modalities, and where a model can hold weights for each."""

from typing import Literal

Modality = Literal["text", "visual"]
MODALITIES: tuple[Modality, Modality] = ("text", "visual")
"""The two modalities, in the order in which a modality-major row holds them."""

Sublayer = Literal["attention", "ffn"]
"""Of a decoder layer: what can hold weights for each modality."""
