"""Which kernels go with which device and precision, and what FP8 asks of sizes and padding.

FP8 products on Hopper take dimensions that are multiples of 16; blockwise scaling takes rows by 128. Everything that
can be known without a GPU is refused here; what the machine must offer is asked at the start of a run, by ``kernels``.
"""

from collections.abc import Iterator
from typing import get_args

from navil_megatron.config.schema import ModalityPart, NaViLConfig

FP8_DIMENSION = 16
"""Both dimensions of every FP8 matrix are multiples of this."""
FP8_ROWS = {"delayed": 16, "tensorwise": 16, "blockwise": 128}
"""Recipe -> multiple of the rows of a modality's segment."""


def kernel_rules(config: NaViLConfig) -> Iterator[str]:
    """Every rule about kernels and precision that the run breaks."""
    runtime, training = config.runtime, config.training
    engine = runtime.kernels == "transformer_engine"
    if engine and runtime.device != "cuda":
        yield (
            f'runtime.kernels = "transformer_engine" needs runtime.device = "cuda", found "{runtime.device}"; set '
            'kernels = "torch"'
        )
    if engine and training.precision != "bf16":
        yield (
            f'runtime.kernels = "transformer_engine" needs training.precision = "bf16", found "{training.precision}"; '
            'change it or set kernels = "torch"'
        )
    fusion = runtime.gradient_accumulation_fusion
    if fusion == "transformer_engine" and not engine:
        yield (
            f'runtime.gradient_accumulation_fusion = "{fusion}", but runtime.kernels = "{runtime.kernels}" has no such '
            'layers; set kernels = "transformer_engine" or the fusion to "none"'
        )
    if fusion == "apex" and runtime.device != "cuda":
        yield (
            f'runtime.gradient_accumulation_fusion = "apex" needs runtime.device = "cuda", found "{runtime.device}"; '
            'set it to "none"'
        )
    language = config.model.language
    if config.runtime.kernels != "torch" and any(language.shares(part) for part in get_args(ModalityPart)):
        yield (
            f"model.language.modality_experts = {list(language.modality_experts)} shares weights between modalities, "
            f'which only runtime.kernels = "torch" does, found "{config.runtime.kernels}"; change one of the two'
        )
    yield from _fp8_rules(config)


def _fp8_rules(config: NaViLConfig) -> Iterator[str]:
    training = config.training
    flags = [name for name in ("fp8_first_last_layers_bf16", "fp8_encoder") if getattr(training, name)]
    if training.fp8 == "none":
        for flag in flags:
            yield f'training.{flag} = true, but training.fp8 = "none"; choose a recipe or set {flag} = false'
        return
    if training.fp8 == "mxfp8":
        yield (
            'training.fp8 = "mxfp8" needs Blackwell GPUs; Hopper has no such products: use "blockwise", "tensorwise" '
            'or "delayed"'
        )
        return
    if config.runtime.kernels != "transformer_engine":
        yield (
            f'training.fp8 = "{training.fp8}" needs runtime.kernels = "transformer_engine", found '
            f'"{config.runtime.kernels}"; change one of the two'
        )
    if config.model.language.num_experts > 1:
        yield (
            f'training.fp8 = "{training.fp8}" with model.language.num_experts = {config.model.language.num_experts}: '
            'the grouped product of several experts runs in BF16 alone; set fp8 = "none" or num_experts = 1'
        )
    if training.fp8 == "delayed":
        for flag in flags:
            yield (
                f'training.{flag} = true does not go with training.fp8 = "delayed", which updates all scales once a '
                'pass through the decoder; use "tensorwise" or "blockwise"'
            )
    yield from _fp8_sizes(config)


def _fp8_sizes(config: NaViLConfig) -> Iterator[str]:
    """Rows that the packer pads, then the matrices as tensor parallelism leaves them."""
    language, vision, context = config.model.language, config.model.vision, config.parallel.context_parallel_size
    rows = FP8_ROWS[config.training.fp8] * context
    if config.data.pad_segments_to % rows:
        on_ranks = f" on each of {context} context-parallel ranks" if context > 1 else ""
        yield (
            f'data.pad_segments_to = {config.data.pad_segments_to}: training.fp8 = "{config.training.fp8}" takes '
            f"segments of a multiple of {rows // context} tokens{on_ranks}; set it to {rows}"
        )
    tensor = config.parallel.tensor_model_parallel_size
    heads = language.num_attention_heads * language.head_dim
    groups = language.num_query_groups * language.head_dim
    sizes = {
        "model.language.hidden_size": language.hidden_size,
        "model.language.num_attention_heads * head_dim": heads // tensor,
        "model.language.(num_attention_heads + 2 * num_query_groups) * head_dim": (heads + 2 * groups) // tensor,
        "model.language.ffn_hidden_size": language.ffn_hidden_size // tensor,
    }
    if config.training.fp8_encoder:
        sizes["model.vision.hidden_size"] = vision.hidden_size
        sizes["model.vision.ffn_hidden_size"] = vision.ffn_hidden_size
    for name, size in sizes.items():
        if size % FP8_DIMENSION:
            yield (
                f"{name} is {size} on one of {tensor} tensor-parallel ranks; FP8 takes multiples of {FP8_DIMENSION}: "
                'change the size or parallel.tensor_model_parallel_size, or set training.fp8 = "none"'
            )
