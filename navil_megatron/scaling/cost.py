"""What a run of a study costs, in FLOPs and GPU-hours.

A multiply-add is 2; the backward pass costs twice the forward pass. The LLM's own attention over so short a row and
the connector are left out; ``blueprint/flops.py`` counts every matrix of a config, and a test holds the two together.
"""

from dataclasses import dataclass

from navil_megatron.scaling.shape import choose_shape

PATCHES_PER_TOKEN = 4  # 2 x 2 patches become one visual token
BACKWARD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CostAssumptions:
    """What a sample holds and what a GPU does; every field is an assumption that the plan prints."""

    tflops: float = 989.0  # dense BF16 peak of a GPU, in TFLOP/s; H100 SXM
    mfu: float = 0.4  # share of the peak that training reaches
    visual_tokens: int = 256  # of a sample's image, at one scale: 512 x 512 pixels
    text_tokens: int = 64


def sample_flops(llm: float, encoder: float, assumed: CostAssumptions) -> float:
    """Training FLOPs of one sample, everything trained: 3 (2 N tokens + 2 V patches + 4 d w patches^2)."""
    shape, _ = choose_shape(encoder)
    patches = PATCHES_PER_TOKEN * assumed.visual_tokens
    decoder = 2 * llm * (assumed.visual_tokens + assumed.text_tokens)
    attention = 4 * shape.depth * shape.width * patches**2
    return (1 + BACKWARD) * (decoder + 2 * encoder * patches + attention)


def run_hours(llm: float, encoder: float, samples: float, assumed: CostAssumptions) -> float:
    """GPU-hours of a run."""
    return samples * sample_flops(llm, encoder, assumed) / (assumed.tflops * 1e12 * assumed.mfu * 3600)
