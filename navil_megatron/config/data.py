"""``[data]``: the samples and their rows."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One source of training samples: a ``[[data.train_sources]]`` table."""

    index: str
    """File that ``navil-megatron data build`` or ``data index`` wrote."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources' weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become packed rows."""

    train_sources: tuple[SourceConfig, ...]
    """The mixture; every global stretch of samples holds each source's share to within one sample."""
    tokenizer: str
    """Folder with a Hugging Face tokenizer that holds the 12 special tokens."""
    seq_length: int = 16_384
    """Tokens of one packed row, padding included."""
    min_image_pixels: int = 65_536
    """Smallest image area, in pixels; smaller images are enlarged to it, smaller scales are not made."""
    max_image_pixels: int = 1_048_576
    """Largest image area, in pixels, before padding (patches times 256)."""
    multi_scale: bool = True
    """Visual multi-scale packing: the image again at tau^i of its size, small to large (paper, section 4.1)."""
    scale_ratio: float = 0.7071
    """tau, the side ratio of successive scales."""
    share_shrunk_limit: bool = False
    """Reproduce the released demo: the limit left by one image's smallest scale caps the next image of the sample."""
    image_decoder: Literal["pillow", "dali"] = "pillow"
    """What decodes and resizes images: ``pillow`` as the reference does, to the bit; ``dali`` NVIDIA DALI, on the GPU
    where ``runtime.device`` is ``cuda``, with the rest as tensor operations, within 2/255 of it."""
    max_source_pixels: int = 67_108_864
    """Largest image file that is decoded, in pixels, read from its header first; a larger one is a failed sample."""
    num_workers: int = 1
    """Background threads that read, decode and pack ahead of the step."""
    prefetch_steps: int = 2
    """Steps prepared ahead."""
    max_failed_share: float = 0.05
    """Largest share of samples seen so far that may fail to decode before the run stops."""
    pad_segments_to: int | None = None
    """Each modality's segment of a row is padded to a multiple of this many tokens; ``None``: 16, or more where FP8 or
    context parallelism need it."""
