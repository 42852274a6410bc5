"""``[data]``: the samples and their rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from navil_megatron.config.model import ModelConfig
from navil_megatron.config.numbers import Count, Positive, Range
from navil_megatron.config.paths import LocalPath


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One source of training samples: a ``[[data.train_sources]]`` table."""

    index: LocalPath
    """File that ``navil-megatron data build`` or ``data index`` wrote."""
    weight: Positive = 1.0
    """Share of the samples, relative to the other sources' weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """How shards behind a URL are read. ``[data.remote]``; ``data index`` takes the defaults."""

    tries: Annotated[int, Range(1, 100)] = 6
    """Times that a read is tried before the network is said to have given up. The pauses between them double from half
    a second to half a minute, each drawn between half of that and one and a half."""
    timeout_seconds: Positive = 60.0
    """Longest wait for one read, a sample or 16 MiB of a shard that is indexed. Its product with ``tries`` should stay
    below ``runtime.collective_timeout_seconds``: the other ranks wait meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become packed rows."""

    train_sources: tuple[SourceConfig, ...]
    """The mixture; every global stretch of samples holds each source's share to within one sample."""
    tokenizer: LocalPath
    """Folder with a Hugging Face tokenizer that holds the 12 special tokens."""
    seq_length: Count = 16_384
    """Tokens of one packed row, padding included."""
    min_image_pixels: Count = 65_536
    """Smallest image area, in pixels; smaller images are enlarged to it, smaller scales are not made."""
    max_image_pixels: Count = 1_048_576
    """Largest image area, in pixels, before padding (patches times 256)."""
    multi_scale: bool = True
    """Visual multi-scale packing: the image again at tau^i of its size, small to large (paper, section 4.1)."""
    scale_ratio: Annotated[float, Range(0, 1, above=True, below=True)] = 0.7071
    """tau, the side ratio of successive scales."""
    image_text_loss: Literal["all", "after_image"] = "all"
    """Which text of a document with images in it is learned: all of it, or what follows its first image."""
    share_shrunk_limit: bool = False
    """Reproduce the released demo: the limit left by one image's smallest scale caps the next image of the sample."""
    image_decoder: Literal["pillow", "dali"] = "pillow"
    """What decodes and resizes images: ``pillow`` as the reference does, to the bit; ``dali`` NVIDIA DALI, on the GPU
    where ``runtime.device`` is ``cuda``, with the rest as tensor operations, within 2/255 of it."""
    max_source_pixels: Count = 67_108_864
    """Largest image file that is decoded, in pixels, read from its header first; a larger one is a failed sample."""
    num_workers: Count = 1
    """Background threads that read, decode and pack ahead of the step."""
    prefetch_steps: Count = 2
    """Steps prepared ahead."""
    max_failed_share: Annotated[float, Range(0, 1)] = 0.05
    """Largest share of samples seen so far that may fail to decode before the run stops."""
    remote: RemoteConfig = RemoteConfig()
    """How shards behind a URL are read."""
    pad_segments_to: Count | None = None
    """Each modality's segment of a row is padded to a multiple of this many tokens; ``None``: 16, or more where FP8 or
    context parallelism need it."""


def data_rules(data: DataConfig, model: ModelConfig) -> Iterator[str]:
    """One line for every rule about samples and rows that the run breaks."""
    vision = model.vision
    if not data.train_sources:
        yield 'data.train_sources is empty; name the sources, e.g. [[data.train_sources]] index = "shards/train.index"'
    if data.min_image_pixels > data.max_image_pixels:
        yield (
            f"data.min_image_pixels = {data.min_image_pixels} is more than data.max_image_pixels = "
            f"{data.max_image_pixels}; swap or change them"
        )
    longest = model.language.max_position_embeddings
    if data.seq_length > longest:
        yield (
            f"data.seq_length = {data.seq_length} is more than model.language.max_position_embeddings = {longest}; "
            "shorten the rows or raise it"
        )
    image_tokens = data.max_image_pixels // (vision.patch_size * vision.merge_size) ** 2
    if image_tokens >= data.seq_length:
        yield (
            f"data.max_image_pixels = {data.max_image_pixels} lets one image take {image_tokens} tokens, but a row has "
            f"data.seq_length = {data.seq_length}; lower the pixels or lengthen the row"
        )
