"""Rules that span settings: what a layout can split, what a row can hold, what the released code supports.

``load_config`` checks each value by itself; ``validate`` checks them against each other and, where it is known, against
the world size.
"""

from collections.abc import Iterator
from typing import get_args

from navil_megatron.config.errors import ConfigError
from navil_megatron.config.evaluation import evaluation_rules
from navil_megatron.config.families import family_rules
from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.modality import MODALITIES, ModalityPart
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.config.optimizer import OptimizerConfig
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.precision import precision_rules
from navil_megatron.config.ranges import check_model_ranges, check_ranges
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.runtime import runtime_rules
from navil_megatron.config.training import Recomputed, TrainingConfig

_GROUPED_WIDTH = 8
"""Numbers in 16 bytes of BF16: torch's grouped product wants rows to start there."""
_SUGGESTED_UP_TO = 64
"""Divisors named in a message stop here: no layout is larger along one axis."""


def validate(config: NaViLConfig, world_size: int | None = None) -> None:
    """Checks a whole run.

    Args:
        config: The run.
        world_size: Ranks it is started with; ``None`` where that is not known yet: the layout's fit stays unchecked.

    Raises:
        ConfigError: with every broken rule, each saying what was found, what was expected and what to do.
    """
    # The rules divide by these numbers, so they come first and alone.
    problems = check_ranges(config)
    if not problems:
        problems = [
            *_language_rules(config.model),
            *_vision_rules(config.model),
            *_row_rules(config),
            *_schedule_rules(config),
            *_recompute_rules(config.training),
            *_overlap_rules(config.optimizer),
            *_layout_rules(config),
            *_pipeline_rules(config.parallel, config.model.language.num_layers),
            *_batch_rules(config, world_size),
            *evaluation_rules(config.evaluation),
            *runtime_rules(config.runtime, config.model.language),
            *precision_rules(config.precision, config.model, config.parallel, config.runtime),
        ]
    if problems:
        raise ConfigError(problems)


def model_problems(model: ModelConfig) -> list[str]:
    """Every rule that a model section breaks by itself, whatever the run."""
    return check_model_ranges(model) or [*_language_rules(model), *_vision_rules(model)]


def _language_rules(model: ModelConfig) -> Iterator[str]:
    language = model.language
    yield from _divides(
        "model.language.num_query_groups",
        language.num_query_groups,
        "model.language.num_attention_heads",
        language.num_attention_heads,
    )
    yield from family_rules(language)
    if language.rope_scaling_factor is not None and language.rope_low_freq_factor >= language.rope_high_freq_factor:
        yield (
            f"model.language.rope_low_freq_factor = {language.rope_low_freq_factor:g} is not less than "
            f"rope_high_freq_factor = {language.rope_high_freq_factor:g}; swap or change them"
        )
    if language.experts_per_token > language.num_experts:
        yield (
            f"model.language.experts_per_token = {language.experts_per_token} is more than num_experts = "
            f"{language.num_experts}; a token's experts are different ones"
        )
    yield from _shared_part_rules(language)
    if language.head_dim % 2:
        yield f"model.language.head_dim = {language.head_dim}: rotary positions turn pairs of channels; make it even"
    width = language.num_attention_heads * language.head_dim
    if language.composed_visual_output_projection and width != language.hidden_size:
        yield (
            "model.language.composed_visual_output_projection needs num_attention_heads * head_dim = hidden_size; "
            f"found {width} and {language.hidden_size}; change head_dim or switch it off"
        )
    ids = model.special_token_ids
    names = ", ".join(SPECIAL_TOKENS)
    if len(ids) != len(SPECIAL_TOKENS):
        yield f"model.special_token_ids holds {len(ids)} ids, expected {len(SPECIAL_TOKENS)}, one for each of {names}"
    for token_id in sorted({token_id for token_id in ids if ids.count(token_id) > 1}):
        yield f"model.special_token_ids holds {token_id} more than once; give every special token an id of its own"
    for token_id in ids:
        if not 0 <= token_id < language.vocab_size:
            yield (
                f"model.special_token_ids holds {token_id}, outside model.language.vocab_size = {language.vocab_size}; "
                "the vocabulary includes the special tokens"
            )


def _shared_part_rules(language: LanguageConfig) -> Iterator[str]:
    """What a part without modality experts excludes."""
    parts = language.modality_experts
    named = f"model.language.modality_experts = {list(parts)}"
    if len(set(parts)) < len(parts):
        yield f"{named} holds a name more than once; name each part once"
    shared = [part for part in get_args(ModalityPart) if language.shares(part)]
    if not shared:
        return
    of_both = f"{named}: both modalities share the text weights of {' and '.join(shared)}"
    if language.visual_expert_init == "random":
        yield f'{of_both}, so no visual ones start at random; set model.language.visual_expert_init = "copy"'
    if language.shares("attention") and language.composed_visual_output_projection:
        yield f"{of_both}; switch model.language.composed_visual_output_projection off"
    if language.shares("ffn") and language.num_experts > 1:
        yield f"{of_both}, and routers belong to a modality; set model.language.num_experts = 1"


def _vision_rules(model: ModelConfig) -> Iterator[str]:
    vision = model.vision
    heads = ("model.vision.num_attention_heads", vision.num_attention_heads)
    uneven = list(_divides(*heads, "model.vision.hidden_size", vision.hidden_size))
    yield from uneven
    if not uneven and vision.head_dim % 4:
        yield (
            f"model.vision: a head has hidden_size / num_attention_heads = {vision.head_dim} channels, expected a "
            "multiple of 4 (2D rotary positions); change one of the two"
        )
    if vision.token_order == "window" and vision.window_size % vision.merge_size:
        yield (
            f"model.vision.window_size = {vision.window_size}: a window holds whole merge blocks, expected a "
            f"multiple of model.vision.merge_size = {vision.merge_size}"
        )
    if vision.full_attention_layers is None:
        return
    if vision.token_order != "window":
        yield (
            f'model.vision.full_attention_layers is set, so the other layers attend inside windows, but token_order = "'
            f'{vision.token_order}"; set model.vision.token_order = "window" or remove full_attention_layers'
        )
    for layer in vision.full_attention_layers:
        if not 0 <= layer < vision.num_layers:
            yield (
                f"model.vision.full_attention_layers names layer {layer}, but model.vision.num_layers = "
                f"{vision.num_layers}; layers count from 0"
            )


def _row_rules(config: NaViLConfig) -> Iterator[str]:
    data, vision = config.data, config.model.vision
    if not data.train_sources:
        yield 'data.train_sources is empty; name the sources, e.g. [[data.train_sources]] index = "shards/train.index"'
    for number, source in enumerate(data.train_sources):
        if not 0 < source.weight < float("inf"):
            yield f"data.train_sources[{number}].weight = {source.weight}: expected more than 0; or leave it out"
    if data.min_image_pixels > data.max_image_pixels:
        yield (
            f"data.min_image_pixels = {data.min_image_pixels} is more than data.max_image_pixels = "
            f"{data.max_image_pixels}; swap or change them"
        )
    yield from _segment_rules(config)
    longest = config.model.language.max_position_embeddings
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


def _segment_rules(config: NaViLConfig) -> Iterator[str]:
    """Segments fill rows, and FP8 and context-parallel ranks take them whole."""
    context, padded = config.parallel.context_parallel_size, config.pad_segments_to
    needed = config.precision.segment_multiple(context)
    if padded % needed:
        yield (
            f'data.pad_segments_to = {padded}: precision.fp8 = "{config.precision.fp8}" on {context} context-parallel '
            f"rank(s) takes segments of a multiple of {needed} tokens; leave it out"
        )
    if config.data.seq_length % padded:
        yield (
            f"data.seq_length = {config.data.seq_length} is no multiple of the {padded} tokens to which segments of a "
            "row are padded (data.pad_segments_to, precision.fp8, parallel.context_parallel_size); make it one"
        )


def _schedule_rules(config: NaViLConfig) -> Iterator[str]:
    optimizer, training = config.optimizer, config.training
    if optimizer.warmup_steps > training.train_steps:
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is more than training.train_steps = "
            f"{training.train_steps}; the peak would never be reached: shorten the warm-up"
        )
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr = {optimizer.min_lr} is more than optimizer.lr = {optimizer.lr}; lower the floor"
    if config.checkpoint.initial_optimizer == "kept" and config.checkpoint.initial_weights is None:
        yield (
            'checkpoint.initial_optimizer = "kept", but checkpoint.initial_weights names no checkpoint to keep it '
            'from; name one or set initial_optimizer = "fresh"'
        )


def _recompute_rules(training: TrainingConfig) -> Iterator[str]:
    chosen = training.recompute_modules
    if training.recompute == "selective" and not chosen:
        yield (
            'training.recompute = "selective", but training.recompute_modules is empty; name some of '
            f'{", ".join(get_args(Recomputed))}, or set training.recompute = "none"'
        )
    if len(set(chosen)) < len(chosen):
        yield f"training.recompute_modules = {list(chosen)} holds a name more than once; name each part once"


def _overlap_rules(optimizer: OptimizerConfig) -> Iterator[str]:
    for needed in ("distributed", "overlap_grad_reduce"):
        if optimizer.overlap_param_gather and not getattr(optimizer, needed):
            yield (
                f"optimizer.overlap_param_gather = true needs optimizer.{needed} = true; switch it on, or switch "
                "overlap_param_gather off"
            )


def _layout_rules(config: NaViLConfig) -> Iterator[str]:
    """What tensor parallelism splits, and what no module of this version does."""
    parallel, language = config.parallel, config.model.language
    tensor = parallel.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        value = getattr(language, name)
        yield from _divides("parallel.tensor_model_parallel_size", tensor, f"model.language.{name}", value)
    if parallel.sequence_parallel and tensor == 1:
        yield (
            "parallel.sequence_parallel = true splits activations over the tensor-parallel ranks, but "
            "parallel.tensor_model_parallel_size = 1; raise it or switch sequence_parallel off"
        )
    if parallel.sequence_parallel:
        yield from _divides("parallel.tensor_model_parallel_size", tensor, "data.seq_length", config.data.seq_length)
    yield from _expert_rules(parallel, language)
    if parallel.context_parallel_size > 1:
        yield from _context_rules(config)


def _context_rules(config: NaViLConfig) -> Iterator[str]:
    """Ranks that share a row hold equally many tokens of each modality, and exchange whole groups of heads."""
    parallel, size = config.parallel, config.parallel.context_parallel_size
    groups = config.model.language.num_query_groups // parallel.tensor_model_parallel_size
    yield from _divides(
        "parallel.context_parallel_size",
        size,
        "model.language.num_query_groups / parallel.tensor_model_parallel_size",
        groups,
    )
    ranks = size * parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and config.data.seq_length % ranks:
        yield (
            f"data.seq_length = {config.data.seq_length} does not divide over tensor * context = {ranks} ranks under "
            f"parallel.sequence_parallel; make it a multiple of {ranks}"
        )


def _expert_rules(parallel: ParallelConfig, language: LanguageConfig) -> Iterator[str]:
    ranks, tensor, split = (
        parallel.expert_model_parallel_size,
        parallel.tensor_model_parallel_size,
        parallel.expert_tensor_size,
    )
    yield from _divides(
        "parallel.expert_model_parallel_size",
        ranks,
        f"the feed-forward experts, {len(MODALITIES)} modalities * model.language.num_experts",
        len(MODALITIES) * language.num_experts,
    )
    if ranks > 1 and language.shares("ffn"):
        yield (
            f"parallel.expert_model_parallel_size = {ranks}, but model.language.modality_experts = "
            f"{list(language.modality_experts)} leaves one feed-forward network for both modalities; set it to 1"
        )
    if ranks == 1 and language.num_experts == 1:
        if split != tensor:
            yield (
                f"parallel.expert_tensor_parallel_size = {split}, but with one expert per modality on every rank "
                f'tensor_model_parallel_size = {tensor} splits the experts too; set it to "none"'
            )
        return
    if tensor > 1 and not parallel.sequence_parallel:
        # Every tensor-parallel rank would hold, and send, all rows.
        yield (
            f"sending rows to experts (num_experts = {language.num_experts}, expert_model_parallel_size = {ranks}) "
            f"with tensor_model_parallel_size = {tensor} needs parallel.sequence_parallel = true; switch it on"
        )
    yield from _divides("parallel.expert_tensor_parallel_size", split, "tensor_model_parallel_size", tensor)
    yield from _divides("parallel.expert_tensor_parallel_size", split, "ffn_hidden_size", language.ffn_hidden_size)
    if language.num_experts > 1:
        for name, size in (
            ("hidden_size", language.hidden_size),
            ("ffn_hidden_size", language.ffn_hidden_size // split),
        ):
            if size % _GROUPED_WIDTH:
                yield (
                    f"model.language.{name} is {size} on one of {split} expert tensor-parallel ranks; the grouped "
                    f"product of several experts takes multiples of {_GROUPED_WIDTH}: change one of the two"
                )


def _pipeline_rules(parallel: ParallelConfig, num_layers: int) -> Iterator[str]:
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size is not None and stages == 1:
        yield (
            "parallel.virtual_pipeline_model_parallel_size is set, but parallel.pipeline_model_parallel_size = 1; "
            'interleaving needs at least 2 stages: set it to "none"'
        )
    chunks = stages * (parallel.virtual_pipeline_model_parallel_size or 1)
    layers = parallel.pipeline_layers
    if layers is None:
        if num_layers % chunks:
            yield (
                f"model.language.num_layers = {num_layers} does not divide evenly over {chunks} pipeline chunks; "
                "set parallel.pipeline_layers to the layers of each chunk"
            )
        return
    if len(layers) != chunks:
        yield (
            f"parallel.pipeline_layers has {len(layers)} entries, expected {chunks}: pipeline_model_parallel_size "
            "times virtual_pipeline_model_parallel_size"
        )
    if min(layers, default=0) < 0:
        yield f"parallel.pipeline_layers = {list(layers)} holds a negative number; a chunk has 0 layers or more"
    if sum(layers) != num_layers:
        yield (
            f"parallel.pipeline_layers = {list(layers)} sums to {sum(layers)}, expected model.language.num_layers = "
            f"{num_layers}"
        )


def _batch_rules(config: NaViLConfig, world_size: int | None) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    micro, total = training.micro_batch_size, training.global_batch_size
    replica, stages = parallel.model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size is not None and world_size % replica:
        yield (
            f"world size {world_size} does not hold whole replicas: one takes tensor * pipeline * context = {replica} "
            f"ranks; start a multiple of {replica} ranks or change [parallel]"
        )
        return
    experts = parallel.expert_ranks
    if world_size is not None and world_size % experts:
        yield (
            f"world size {world_size} does not hold whole sets of experts: one takes tensor * pipeline * expert = "
            f"{experts} ranks; start a multiple of {experts} ranks or change [parallel]"
        )
        return
    data_parallel = 1 if world_size is None else world_size // replica
    if total % (micro * data_parallel):
        yield (
            f"training.global_batch_size = {total} is not a multiple of micro_batch_size * data-parallel ranks = "
            f"{micro} * {data_parallel} = {micro * data_parallel}; change one of them"
        )
        return
    num_microbatches = total // (micro * data_parallel)
    # Without a world size data_parallel is 1, and more data-parallel ranks may still make the number right or wrong.
    if parallel.virtual_pipeline_model_parallel_size and world_size is not None and num_microbatches % stages:
        yield (
            f"the interleaved schedule needs microbatches in multiples of pipeline_model_parallel_size = {stages}, "
            f"found {num_microbatches}; change training.global_batch_size"
        )


def _divides(divisor_key: str, divisor: int, key: str, value: int) -> Iterator[str]:
    """One problem if ``divisor`` does not divide ``value``, naming the divisors that would."""
    if value % divisor:
        choices = [str(n) for n in range(1, min(value, _SUGGESTED_UP_TO) + 1) if value % n == 0]
        yield f"{divisor_key} = {divisor} does not divide {key} = {value}; use one of {', '.join(choices)}"
