"""config/validate.py and the sections: each rule, broken one at a time."""

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest

from navil_megatron.config.errors import ConfigError
from navil_megatron.config.load import section_from_dict
from navil_megatron.config.numbers import Count, Range, bound_of
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import validate
from tests.unit.config_examples import example_tables

IDS = list(range(84, 96))
INTERNLM2 = {"model__language__family": "internlm2", "model__language__qk_norm": False}
LLAMA = {"model__language__family": "llama", "model__language__qk_norm": False}
ENGINE = {"runtime__device": "cuda", "runtime__kernels": "transformer_engine"}
TENSORWISE = {**ENGINE, "precision__fp8": "tensorwise"}
DELAYED = {**ENGINE, "precision__fp8": "delayed"}


def configured(**settings: Any) -> NaViLConfig:
    """The example run with dotted settings changed, written ``section__field=value``."""
    tables = example_tables()
    for key, value in settings.items():
        *sections, name = key.split("__")
        table = tables
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return section_from_dict(NaViLConfig, tables, "example")


def problems_of(config: NaViLConfig, world_size: int | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size)
    return caught.value.problems


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ({}, None),
        ({}, 1),
        ({}, 8),
        ({"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}, 2),
        ({"parallel__tensor_model_parallel_size": 2}, 4),
        ({"parallel__tensor_model_parallel_size": 2, "model__language__vocab_size": 577}, 2),
        ({"parallel__pipeline_model_parallel_size": 2}, 2),
        ({"parallel__expert_model_parallel_size": 2}, 2),
        ({"parallel__context_parallel_size": 2}, 2),
        ({"parallel__context_parallel_size": 2, "parallel__expert_model_parallel_size": 2}, 2),
        ({"parallel__pipeline_model_parallel_size": 2, "parallel__pipeline_layers": [1, 3]}, 2),
        ({"parallel__pipeline_model_parallel_size": 2, "parallel__pipeline_layers": [0, 4]}, 4),
        ({"parallel__pipeline_model_parallel_size": 2, "parallel__virtual_pipeline_model_parallel_size": 2}, 2),
        ({"model__vision__num_layers": 0}, 1),
        ({"model__vision__token_order": "window", "model__vision__full_attention_layers": [0, 1]}, 1),
        ({"model__vision__token_order": "window", "model__vision__full_attention_layers": []}, 1),
        ({**INTERNLM2, "model__language__composed_visual_output_projection": True}, 1),
        ({"model__language__family": "qwen2", "model__language__qk_norm": False, "model__language__qkv_bias": True}, 1),
        ({**LLAMA, "model__language__rope_scaling_factor": 8.0}, 1),
        (ENGINE, 8),
        ({**ENGINE, "runtime__gradient_accumulation_fusion": "transformer_engine"}, 8),
        ({"runtime__device": "cuda", "runtime__gradient_accumulation_fusion": "apex"}, 8),
        ({**DELAYED, "training__recompute": "full"}, 8),
        ({**TENSORWISE, "precision__fp8_first_last_layers_bf16": True}, 8),
        ({**TENSORWISE, "precision__fp8_encoder": True, "model__vision__hidden_size": 48}, 8),
        ({**ENGINE, "precision__fp8": "blockwise"}, 8),
        ({**ENGINE, "precision__fp8": "blockwise", "data__pad_segments_to": 256}, 8),
        ({**TENSORWISE, "parallel__tensor_model_parallel_size": 2}, 8),
    ],
)
def test_good_runs_pass(settings: dict[str, Any], world_size: int | None) -> None:
    validate(configured(**settings), world_size)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 16),
        ({"data__pad_segments_to": 4}, 4),
        ({"parallel__context_parallel_size": 2}, 16),
        (DELAYED, 16),
        ({**TENSORWISE, "parallel__context_parallel_size": 2}, 32),
        ({"precision__fp8": "blockwise"}, 128),
        ({"precision__fp8": "blockwise", "parallel__context_parallel_size": 2}, 256),
    ],
)
def test_padding_of_segments_follows_from_fp8_and_context_parallelism(settings: dict[str, Any], expected: int) -> None:
    assert configured(**settings).pad_segments_to == expected


BROKEN: list[tuple[dict[str, Any], int | None, str]] = [
    (
        {"model__language__num_query_groups": 3},
        None,
        "num_query_groups = 3 does not divide model.language.num_attention_heads = 4; use one of 1, 2, 4",
    ),
    ({"model__language__head_dim": 7}, None, "model.language.head_dim = 7: rotary positions turn pairs"),
    (
        {**INTERNLM2, "model__language__composed_visual_output_projection": True, "model__language__head_dim": 16},
        None,
        "found 64 and 32; change head_dim or switch it off",
    ),
    (
        {"model__language__qk_norm": False},
        None,
        "model.language.qk_norm is false, but models of the qwen3 family have true; change it or model.language.family",
    ),
    ({**LLAMA, "model__language__qkv_bias": True}, None, "model.language.qkv_bias is true, but models of the llama"),
    (
        {"model__language__composed_visual_output_projection": True},
        None,
        "the qwen3 family has no such output; set it to false or use family internlm2",
    ),
    (
        {**LLAMA, "model__language__rope_scaling_factor": 8.0, "model__language__rope_low_freq_factor": 4.0},
        None,
        "model.language.rope_low_freq_factor = 4 is not less than rope_high_freq_factor = 4; swap or change them",
    ),
    ({"model__special_token_ids": IDS[:-1]}, None, "model.special_token_ids holds 11 ids, expected 12"),
    ({"model__special_token_ids": [*IDS[:-1], 84]}, None, "model.special_token_ids holds 84 more than once"),
    ({"model__special_token_ids": [*IDS[:-1], 96]}, None, "holds 96, outside model.language.vocab_size = 96"),
    ({"model__special_token_ids": [*IDS[:-1], -1]}, None, "holds -1, outside model.language.vocab_size = 96"),
    (
        {"model__vision__num_attention_heads": 5},
        None,
        "model.vision.num_attention_heads = 5 does not divide model.vision.hidden_size = 24",
    ),
    ({"model__vision__num_attention_heads": 4}, None, "num_attention_heads = 6 channels, expected a multiple of 4"),
    (
        {"model__vision__token_order": "window", "model__vision__window_size": 5},
        None,
        "model.vision.window_size = 5: a window holds whole merge blocks, expected a multiple of",
    ),
    ({"model__vision__full_attention_layers": [1]}, None, 'set model.vision.token_order = "window"'),
    (
        {"model__vision__token_order": "window", "model__vision__full_attention_layers": [2]},
        None,
        "model.vision.full_attention_layers names layer 2, but model.vision.num_layers = 2; layers count from 0",
    ),
    ({"data__train_sources": []}, None, "data.train_sources is empty"),
    (
        {"data__train_sources": [{"index": "a"}, {"index": "b", "weight": 0.0}]},
        None,
        "data.train_sources[1].weight = 0.0: expected more than 0",
    ),
    ({"data__min_image_pixels": 2_000_000}, None, "is more than data.max_image_pixels = 1048576"),
    (
        {"data__seq_length": 2040},
        None,
        "data.seq_length = 2040 is no multiple of the 16 tokens to which segments of a row are padded (data",
    ),
    ({"data__seq_length": 65536}, None, "is more than model.language.max_position_embeddings = 32768"),
    ({"data__seq_length": 1024}, None, "lets one image take 1024 tokens, but a row has data.seq_length = 1024"),
    ({"optimizer__warmup_steps": 1001}, None, "optimizer.warmup_steps = 1001 is more than training.train_steps = 1000"),
    ({"optimizer__min_lr": 0.1}, None, "optimizer.min_lr = 0.1 is more than optimizer.lr = 0.001"),
    (
        {"training__recompute": "selective", "training__recompute_modules": []},
        None,
        "training.recompute_modules is empty; name some of attention, mlp, encoder, or set",
    ),
    (
        {"training__recompute_modules": ["mlp", "mlp"]},
        None,
        "training.recompute_modules = ['mlp', 'mlp'] holds a name more than once; name each part once",
    ),
    (
        {"optimizer__overlap_param_gather": True},
        None,
        "optimizer.overlap_param_gather = true needs optimizer.overlap_grad_reduce = true; switch it on, or",
    ),
    (
        {
            "optimizer__overlap_param_gather": True,
            "optimizer__overlap_grad_reduce": True,
            "optimizer__distributed": False,
        },
        None,
        "optimizer.overlap_param_gather = true needs optimizer.distributed = true; switch it on, or",
    ),
    ({"evaluation__every_steps": 10}, None, "evaluation.sources is empty"),
    (
        {"parallel__tensor_model_parallel_size": 4},
        4,
        "parallel.tensor_model_parallel_size = 4 does not divide model.language.num_query_groups = 2; use one of 1, 2",
    ),
    ({"parallel__sequence_parallel": True}, 1, "but parallel.tensor_model_parallel_size = 1; raise it or switch"),
    (
        {
            "parallel__sequence_parallel": True,
            "parallel__tensor_model_parallel_size": 2,
            "data__seq_length": 1025,
            "data__pad_segments_to": 1,
        },
        2,
        "parallel.tensor_model_parallel_size = 2 does not divide data.seq_length = 1025",
    ),
    (
        {"parallel__expert_model_parallel_size": 4},
        4,
        "expert_model_parallel_size = 4 does not divide the feed-forward experts, 2 modalities * model.language."
        "num_experts = 2; use one of 1, 2",
    ),
    (
        {"parallel__expert_tensor_parallel_size": 1, "parallel__tensor_model_parallel_size": 2},
        2,
        "with one expert per modality on every rank tensor_model_parallel_size = 2 splits the experts too",
    ),
    (
        {
            "model__language__num_experts": 4,
            "parallel__expert_tensor_parallel_size": 2,
            "parallel__expert_model_parallel_size": 2,
        },
        4,
        "parallel.expert_tensor_parallel_size = 2 does not divide tensor_model_parallel_size = 1",
    ),
    (
        {"parallel__expert_model_parallel_size": 2, "parallel__tensor_model_parallel_size": 2},
        4,
        "with tensor_model_parallel_size = 2 needs parallel.sequence_parallel = true; switch it on",
    ),
    (
        {"parallel__expert_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2},
        2,
        "world size 2 does not hold whole sets of experts: one takes tensor * pipeline * expert = 4 ranks",
    ),
    (
        {"model__language__num_experts": 2, "parallel__tensor_model_parallel_size": 2},
        2,
        "with tensor_model_parallel_size = 2 needs parallel.sequence_parallel = true; switch it on",
    ),
    (
        {"model__language__num_experts": 2, "model__language__ffn_hidden_size": 50},
        1,
        "model.language.ffn_hidden_size is 50 on one of 1 expert tensor-parallel ranks; the grouped product of several",
    ),
    (
        {"training__generate_every_steps": 5},
        1,
        "training.generate_every_steps = 5, but evaluation.sources is empty",
    ),
    (
        {"training__profile_steps": (3, 2)},
        1,
        "training.profile_steps = [3, 2], expected the first and the last step of a part of the run's",
    ),
    (
        {"training__profile_steps": (1, 2), "training__profile_ranks": (0, 1)},
        1,
        "training.profile_ranks = [0, 1], expected some of the ranks from 0 to 0",
    ),
    (
        {"checkpoint__initial_optimizer": "kept"},
        1,
        "but checkpoint.initial_weights names no checkpoint to keep it from",
    ),
    (
        {"checkpoint__local_directory": "/local"},
        1,
        "checkpoint.local_every_steps how often they are made; set both or neither",
    ),
    (
        {"checkpoint__local_directory": "runs/example/checkpoints", "checkpoint__local_every_steps": 5},
        1,
        "'runs/example/checkpoints' is checkpoint.directory, too; give a folder on a disk of the node",
    ),
    (
        {"model__language__modality_experts": ("ffn", "ffn")},
        1,
        "modality_experts = ['ffn', 'ffn'] holds a name more than once",
    ),
    (
        {"model__language__modality_experts": ("ffn",), "model__language__visual_expert_init": "random"},
        1,
        "both modalities share the text weights of attention, so no visual ones start at random",
    ),
    (
        {"model__language__modality_experts": ("attention",), "model__language__num_experts": 2},
        1,
        "both modalities share the text weights of ffn, and routers belong to a modality",
    ),
    (
        {"model__language__modality_experts": (), "parallel__expert_model_parallel_size": 2},
        2,
        "modality_experts = [] leaves one feed-forward network for both modalities; set it to 1",
    ),
    (
        {**ENGINE, "model__language__modality_experts": ()},
        8,
        'which only runtime.kernels = "torch" does, found "transformer_engine"',
    ),
    ({"model__language__experts_per_token": 2}, 1, "experts_per_token = 2 is more than num_experts = 1"),
    (
        {"parallel__context_parallel_size": 4},
        4,
        "context_parallel_size = 4 does not divide model.language.num_query_groups / parallel.tensor_model",
    ),
    (
        {"parallel__context_parallel_size": 2, "data__pad_segments_to": 1},
        2,
        'data.pad_segments_to = 1, but precision.fp8 = "none" and parallel.context_parallel_size = 2 take multiples',
    ),
    (
        {
            "parallel__context_parallel_size": 2,
            "parallel__tensor_model_parallel_size": 4,
            "parallel__sequence_parallel": True,
            "model__language__num_query_groups": 8,
            "model__language__num_attention_heads": 8,
            "data__seq_length": 2052,
            "data__pad_segments_to": 2,
        },
        8,
        "data.seq_length = 2052 does not divide over tensor * context = 8 ranks under parallel.sequence_parallel",
    ),
    ({"parallel__virtual_pipeline_model_parallel_size": 2}, 1, "interleaving needs at least 2 stages"),
    ({"parallel__pipeline_model_parallel_size": 3}, 3, "num_layers = 4 does not divide evenly over 3 pipeline chunks"),
    (
        {"parallel__pipeline_model_parallel_size": 2, "parallel__pipeline_layers": [1, 1, 2]},
        2,
        "parallel.pipeline_layers has 3 entries, expected 2",
    ),
    (
        {"parallel__pipeline_model_parallel_size": 2, "parallel__pipeline_layers": [1, 2]},
        2,
        "parallel.pipeline_layers = [1, 2] sums to 3, expected model.language.num_layers = 4",
    ),
    (
        {"parallel__pipeline_model_parallel_size": 2, "parallel__pipeline_layers": [-1, 5]},
        2,
        "parallel.pipeline_layers[0] = -1: expected at least 0",
    ),
    (
        {"parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2},
        6,
        "world size 6 does not hold whole replicas: one takes tensor * pipeline * context = 4 ranks",
    ),
    ({}, 3, "training.global_batch_size = 8 is not a multiple of micro_batch_size * data-parallel ranks = 1 * 3 = 3"),
    ({"training__micro_batch_size": 3}, None, "training.global_batch_size = 8 is not a multiple of micro_batch_size"),
    (
        {
            "parallel__pipeline_model_parallel_size": 2,
            "parallel__virtual_pipeline_model_parallel_size": 2,
            "training__global_batch_size": 3,
        },
        2,
        "the interleaved schedule needs microbatches in multiples of pipeline_model_parallel_size = 2, found 3",
    ),
    ({**ENGINE, "precision__type": "fp32"}, 8, 'needs precision.type = "bf16", found "fp32"; change it or'),
    (
        {"runtime__device": "cuda", "model__language__head_dim": 12},
        8,
        "model.language.head_dim is 12; attention in BF16 on a GPU takes heads of a multiple of 8 channels,",
    ),
    (
        {"runtime__device": "cuda", "model__vision__hidden_size": 264, "model__vision__num_attention_heads": 1},
        8,
        "model.vision.hidden_size / num_attention_heads is 264; attention in BF16 on a GPU takes heads of a multiple",
    ),
    (
        {"runtime__gradient_accumulation_fusion": "transformer_engine"},
        8,
        'but runtime.kernels = "torch" has no such layers; set kernels = "transformer_engine" or the fusion to "none"',
    ),
    (
        {"runtime__gradient_accumulation_fusion": "apex"},
        8,
        'fusion = "apex" needs runtime.device = "cuda", found "cpu"',
    ),
    (
        {"precision__fp8": "mxfp8"},
        8,
        'fp8 = "mxfp8" needs Blackwell GPUs; Hopper has no such products: use "blockwise"',
    ),
    ({"precision__fp8": "delayed"}, 8, 'fp8 = "delayed" needs runtime.kernels = "transformer_engine", found "torch"'),
    ({"precision__fp8_encoder": True}, 8, 'fp8_encoder = true, but precision.fp8 = "none"; choose a recipe or set'),
    (
        {**DELAYED, "precision__fp8_first_last_layers_bf16": True},
        8,
        'fp8_first_last_layers_bf16 = true does not go with precision.fp8 = "delayed", which updates all scales once',
    ),
    (
        {**DELAYED, "precision__fp8_encoder": True, "model__vision__hidden_size": 48},
        8,
        'precision.fp8_encoder = true does not go with precision.fp8 = "delayed"',
    ),
    (
        {**TENSORWISE, "data__pad_segments_to": 8},
        8,
        'data.pad_segments_to = 8, but precision.fp8 = "tensorwise" and parallel.context_parallel_size = 1 take mult',
    ),
    (
        {**ENGINE, "precision__fp8": "blockwise", "data__pad_segments_to": 16},
        8,
        "parallel.context_parallel_size = 1 take multiples of 128 tokens; leave it out",
    ),
    (
        {**TENSORWISE, "parallel__tensor_model_parallel_size": 2, "model__language__ffn_hidden_size": 48},
        8,
        "model.language.ffn_hidden_size is 24 on one of 2 tensor-parallel ranks; FP8 takes multiples of 16: change",
    ),
    ({**TENSORWISE, "model__language__hidden_size": 40}, 8, "model.language.hidden_size is 40 on one of 1 tensor-"),
    (
        {**TENSORWISE, "precision__fp8_encoder": True},
        8,
        "model.vision.hidden_size is 24 on one of 1 tensor-parallel ranks; FP8 takes multiples of 16",
    ),
]


@pytest.mark.parametrize(("settings", "world_size", "expected"), BROKEN, ids=[case[2][:60] for case in BROKEN])
def test_broken_rule(settings: dict[str, Any], world_size: int | None, expected: str) -> None:
    (problem,) = problems_of(configured(**settings), world_size)
    assert expected in problem
    assert "\n" not in problem


def test_every_broken_rule_at_once() -> None:
    config = configured(
        data__train_sources=[], optimizer__warmup_steps=5000, parallel__context_parallel_size=4, data__seq_length=2040
    )
    assert len(problems_of(config, 4)) == 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__language__num_query_groups": 0}, "model.language.num_query_groups = 0: expected at least 1"),
        ({"optimizer__lr": 0.0}, "optimizer.lr = 0.0: expected more than 0"),
        ({"training__seed": -1}, "training.seed = -1: expected at least 0 and less than 2,147,483,648"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr = nan: expected more than 0"),
        ({"optimizer__lr": float("inf")}, "optimizer.lr = inf: expected more than 0"),
        ({"optimizer__beta1": 1.0}, "optimizer.beta1 = 1.0: expected at least 0 and less than 1"),
        ({"data__max_failed_share": 1.5}, "data.max_failed_share = 1.5: expected at least 0 and at most 1"),
        ({"data__scale_ratio": 0.0}, "data.scale_ratio = 0.0: expected more than 0 and less than 1"),
    ],
)
def test_number_out_of_range(settings: dict[str, Any], expected: str) -> None:
    assert problems_of(configured(**settings)) == (expected,)


def numbers_without_bound(section: type[Any], key: str = "") -> set[str]:
    """Dotted names of every setting that holds a number, or an array of them, and no bound."""
    found = set()
    for name, hint in get_type_hints(section, include_extras=True).items():
        dotted = f"{key}.{name}" if key else name
        plain = [hint, *get_args(hint)]
        for inner in filter(dataclasses.is_dataclass, plain):
            found |= numbers_without_bound(inner, dotted)
        if bound_of(hint) is None and {int, float} & {*plain, *(leaf for part in plain for leaf in get_args(part))}:
            found.add(dotted)
    return found


def test_every_number_has_a_bound_at_its_field() -> None:
    # What these may hold depends on another setting: rules say it.
    assert numbers_without_bound(NaViLConfig) == {"model.special_token_ids", "model.vision.full_attention_layers"}


def test_a_number_without_bound_is_found() -> None:
    @dataclasses.dataclass
    class Section:
        bounded: Count
        free: int
        off: float | None
        many: tuple[int, ...] | None
        flag: bool

    assert numbers_without_bound(Section) == {"free", "off", "many"}


def test_range_reads_as_it_checks() -> None:
    assert Range(0, 1).holds(1)
    assert not Range(0, 1, below=True).holds(1)
    assert not Range(0, above=True).holds(0)
    assert str(Range(0, 1, above=True)) == "more than 0 and at most 1"
