"""``[precision]``: types of numbers, and what they ask of kernels, sizes and padding.

FP8 products on Hopper take dimensions that are multiples of 16; blockwise scaling takes rows by 128. Everything that
can be known without a GPU is refused here; what the machine must offer is asked at the start of a run, by ``kernels``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Literal

from navil_megatron.config.data import DataConfig
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.runtime import RuntimeConfig

FP8_DIMENSION = 16
"""Both dimensions of every FP8 matrix are multiples of this."""
FP8_ROWS = {"delayed": 16, "tensorwise": 16, "blockwise": 128}
"""Recipe -> multiple of the rows of a modality's segment."""
HEAD_MULTIPLE, LARGEST_HEAD = 8, 256
"""Attention in BF16 on a GPU takes heads of a multiple of so many channels, and of so many at most."""
_SEGMENT_MULTIPLE = 16  # tokens to which segments are padded where nothing asks for more


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """In which types of numbers the run computes."""

    type: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations; gradients, master weights and moments are FP32."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """Recipe of the decoder's matrix products (``runtime.kernels = "transformer_engine"``): ``delayed`` scales by the
    largest values of past steps, ``tensorwise`` by those of the tensor itself, ``blockwise`` by those of 128-wide
    blocks. Weights and checkpoints stay BF16. The scales of ``delayed`` are not saved: a resumed run starts with 1, as
    a new one does. ``mxfp8`` needs Blackwell and is refused."""
    fp8_first_last_layers_bf16: bool = False
    """Keep the decoder's first and last layer in BF16; not with ``delayed``, whose scales are updated once a pass."""
    fp8_encoder: bool = False
    """Run the encoder's layers in FP8 too; not with ``delayed``."""

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 4 if self.type == "fp32" else 2

    def segment_multiple(self, parallel: ParallelConfig) -> int:
        """Tokens of which each modality's segment of a row holds a multiple, so that every rank's share fits FP8."""
        return FP8_ROWS.get(self.fp8, 1) * parallel.context_parallel_size


def padding_of_segments(precision: PrecisionConfig, data: DataConfig, parallel: ParallelConfig) -> int:
    """Each modality's segment of a row is padded to a multiple of this many tokens."""
    return data.pad_segments_to or lcm(_SEGMENT_MULTIPLE, precision.segment_multiple(parallel))


def precision_rules(
    precision: PrecisionConfig, model: ModelConfig, data: DataConfig, parallel: ParallelConfig, runtime: RuntimeConfig
) -> Iterator[str]:
    """One line for every rule about types of numbers that the run breaks."""
    if runtime.kernels == "transformer_engine" and precision.type != "bf16":
        yield (
            f'runtime.kernels = "transformer_engine" needs precision.type = "bf16", found "{precision.type}"; '
            'change it or set kernels = "torch"'
        )
    if runtime.device == "cuda" and precision.type == "bf16":
        yield from _head_sizes(model)
    yield from _segment_rules(precision, data, parallel)
    yield from _fp8_rules(precision, model, runtime)
    if precision.fp8 in FP8_ROWS:
        yield from _fp8_sizes(precision, model, parallel.tensor_model_parallel_size)


def _head_sizes(model: ModelConfig) -> Iterator[str]:
    sizes = {
        "model.language.head_dim": model.language.head_dim,
        "model.vision.hidden_size / num_attention_heads": model.vision.head_dim,
    }
    for name, size in sizes.items():
        if size % HEAD_MULTIPLE or size > LARGEST_HEAD:
            yield (
                f"{name} is {size}; attention in BF16 on a GPU takes heads of a multiple of {HEAD_MULTIPLE} channels, "
                f'{LARGEST_HEAD} at most: change it or set precision.type = "fp32"'
            )


def _segment_rules(precision: PrecisionConfig, data: DataConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Segments fill rows, and FP8 and context-parallel ranks take them whole."""
    needed, padded = precision.segment_multiple(parallel), padding_of_segments(precision, data, parallel)
    if padded % needed:
        yield (
            f'data.pad_segments_to = {padded}, but precision.fp8 = "{precision.fp8}" and '
            f"parallel.context_parallel_size = {parallel.context_parallel_size} take multiples of {needed} tokens; "
            "leave it out"
        )
    if data.seq_length % padded:
        yield (
            f"data.seq_length = {data.seq_length} is no multiple of the {padded} tokens to which segments of a row are "
            "padded (data.pad_segments_to, precision.fp8, parallel.context_parallel_size); make it one"
        )


def _fp8_rules(precision: PrecisionConfig, model: ModelConfig, runtime: RuntimeConfig) -> Iterator[str]:
    flags = [name for name in ("fp8_first_last_layers_bf16", "fp8_encoder") if getattr(precision, name)]
    if precision.fp8 == "none":
        for flag in flags:
            yield f'precision.{flag} = true, but precision.fp8 = "none"; choose a recipe or set {flag} = false'
        return
    if precision.fp8 == "mxfp8":
        yield (
            'precision.fp8 = "mxfp8" needs Blackwell GPUs; Hopper has no such products: use "blockwise", "tensorwise" '
            'or "delayed"'
        )
        return
    if runtime.kernels != "transformer_engine":
        yield (
            f'precision.fp8 = "{precision.fp8}" needs runtime.kernels = "transformer_engine", found '
            f'"{runtime.kernels}"; change one of the two'
        )
    if precision.fp8 == "delayed":
        for flag in flags:
            yield (
                f'precision.{flag} = true does not go with precision.fp8 = "delayed", which updates all scales once a '
                'pass through the decoder; use "tensorwise" or "blockwise"'
            )


def _fp8_sizes(precision: PrecisionConfig, model: ModelConfig, tensor: int) -> Iterator[str]:
    """The matrices as tensor parallelism leaves them."""
    language, vision = model.language, model.vision
    heads = language.num_attention_heads * language.head_dim
    groups = language.num_query_groups * language.head_dim
    sizes = {
        "model.language.hidden_size": language.hidden_size,
        "model.language.num_attention_heads * head_dim": heads // tensor,
        "model.language.(num_attention_heads + 2 * num_query_groups) * head_dim": (heads + 2 * groups) // tensor,
        "model.language.ffn_hidden_size": language.ffn_hidden_size // tensor,
    }
    if precision.fp8_encoder:
        sizes["model.vision.hidden_size"] = vision.hidden_size
        sizes["model.vision.ffn_hidden_size"] = vision.ffn_hidden_size
    for name, size in sizes.items():
        if size % FP8_DIMENSION:
            yield (
                f"{name} is {size} on one of {tensor} tensor-parallel ranks; FP8 takes multiples of {FP8_DIMENSION}: "
                'change the size or parallel.tensor_model_parallel_size, or set precision.fp8 = "none"'
            )
