"""The model section of our config <-> a Hugging Face ``config.json`` in the authors' layout.

Every size, bias and norm kind is read, none assumed. A value that would change the computation in a way the model
does not have is refused by name; values that only steer the authors' training or demo are left alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import SPECIAL_TOKENS, LanguageConfig, ModelConfig, VisionConfig

MODEL_TYPE = "navil_chat"
_ARCHITECTURES = {"qwen3": "Qwen3VEForCausalLM", "internlm2": "InternLM2VEForCausalLM"}
_NORMS = {"rmsnorm": "rms_norm", "layernorm": "layer_norm"}
AUTO_MAP = {
    "AutoConfig": "configuration_navil_chat.NaViLChatConfig",
    "AutoModel": "modeling_navil_chat.NaViL",
    "AutoModelForCausalLM": "modeling_navil_chat.NaViL",
    "AutoModelForImageTextToText": "modeling_navil_chat.NaViL",
    "AutoProcessor": "processing_navil_chat.NaViLProcessor",
    "AutoImageProcessor": "processing_navil_chat.NaViLImageProcessor",
}
"""Which class of the folder's own code each transformers ``Auto`` class loads."""


def model_config_from_hf(
    config_json: Mapping[str, Any], special_token_ids: Sequence[int] | Mapping[str, int] | None = None
) -> ModelConfig:
    """The model section for a parsed ``config.json``.

    Args:
        config_json: The file's content; the authors' layout or ours, which adds keys to it.
        special_token_ids: Ids in the order of ``SPECIAL_TOKENS`` or by name. ``None``: taken from the config.

    Raises:
        UserError: The config asks for something the model does not have, or lacks a size; all problems at once.
    """
    llm, vision = config_json.get("llm_config"), config_json.get("vision_config")
    if not isinstance(llm, Mapping) or not isinstance(vision, Mapping):
        raise UserError(
            "config.json has no llm_config and vision_config sections: found "
            f"model_type {config_json.get('model_type')!r}, expected a NaViL folder ({MODEL_TYPE!r})"
        )
    family = _family(llm)
    problems = [*_missing(llm, vision), *_unsupported(config_json, llm, vision, family)]
    if problems:
        raise UserError("config.json cannot be converted: " + "; ".join(problems))
    return ModelConfig(
        language=_language_from_hf(llm, family),
        vision=_vision_from_hf(vision, round(1 / config_json.get("downsample_ratio", 0.5))),
        special_token_ids=_ordered_ids(
            config_json.get("special_token_ids") if special_token_ids is None else special_token_ids
        ),
        connector_norm_epsilon=config_json.get("connector_norm_eps", 1e-5),
    )


def hf_config_from_model(
    model: ModelConfig, *, dtype: str, token_ids: Mapping[str, int | None], image_settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Args:
        model: Our model section.
        dtype: Name of the weights' type, e.g. ``"bfloat16"``.
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of the tokenizer; empty without one.
        image_settings: ``min_dynamic_patch``, ``max_dynamic_patch``, ``scale_downsample_ratio`` and the like.

    Raises:
        UserError: The family's HF layout has no place for a setting of the model.
    """
    _refuse_unnamed(model)
    ids = {name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "architectures": ["NaViL"],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        "anyres_image_size": True,
        "connector_norm_eps": model.connector_norm_epsilon,
        "downsample_ratio": 1 / model.vision.merge_size,
        "force_image_size": model.vision.patch_size * model.vision.merge_size,
        "ps_version": "v1",
        "select_layer": -1,
        "tie_word_embeddings": model.language.tied_embeddings,
        "torch_dtype": dtype,
        **ids,
        **image_settings,
        "special_token_ids": list(model.special_token_ids),
        "llm_config": _language_to_hf(model.language) | ids,
        "vision_config": _vision_to_hf(model.vision),
    }


def _language_from_hf(llm: Mapping[str, Any], family: str) -> LanguageConfig:
    heads = llm["num_attention_heads"]
    return LanguageConfig(
        family="qwen3" if family == "qwen3" else "internlm2",
        num_layers=llm["num_hidden_layers"],
        hidden_size=llm["hidden_size"],
        ffn_hidden_size=llm["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=llm.get("num_key_value_heads") or heads,
        head_dim=llm.get("head_dim") or llm["hidden_size"] // heads,
        vocab_size=llm["vocab_size"],
        qk_norm=family == "qwen3",
        composed_visual_output_projection=llm.get("composed_visual_output_projection", family == "internlm2"),
        rope_theta=float(_rope(llm).get("rope_theta", 1e6)),
        norm_epsilon=llm["rms_norm_eps"],
        max_position_embeddings=llm.get("max_position_embeddings", 32_768),
        tied_embeddings=llm.get("tie_word_embeddings", False),
        init_std=llm.get("initializer_range", 0.02),
    )


def _language_to_hf(language: LanguageConfig) -> dict[str, Any]:
    extra: dict[str, Any] = {"attention_bias": False, "sliding_window": None, "use_sliding_window": False}
    if language.family == "internlm2":
        composed = language.composed_visual_output_projection
        extra = {"bias": False, "composed_visual_output_projection": composed}
    return {
        "architectures": [_ARCHITECTURES[language.family]],
        "model_type": language.family,
        "num_hidden_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "head_dim": language.head_dim,
        "vocab_size": language.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": language.norm_epsilon,
        "rope_theta": language.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": language.max_position_embeddings,
        "tie_word_embeddings": language.tied_embeddings,
        "initializer_range": language.init_std,
        "use_cache": True,
        **extra,
    }


def _vision_from_hf(vision: Mapping[str, Any], merge_size: int) -> VisionConfig:
    full_attention = vision.get("fullatt_block_indexes")
    return VisionConfig(
        num_layers=vision["num_hidden_layers"],
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_attention_heads=vision["num_attention_heads"],
        patch_size=vision["patch_size"],
        merge_size=merge_size,
        norm="rmsnorm" if vision.get("norm_type", "rms_norm") == "rms_norm" else "layernorm",
        norm_epsilon=vision["layer_norm_eps"],
        qkv_bias=vision.get("qkv_bias", False),
        layer_scale_init=vision.get("initializer_factor", 0.1),
        rope_theta=float(vision.get("rope_theta", 1e4)),
        token_order=vision.get("token_order", "window"),
        window_size=vision.get("window_size", 8),
        full_attention_layers=None if full_attention is None else tuple(full_attention),
        init_std=vision.get("initializer_range", 0.02),
    )


def _vision_to_hf(vision: VisionConfig) -> dict[str, Any]:
    full_attention = vision.full_attention_layers
    return {
        "architectures": None,
        "model_type": "navil_vit",
        "num_hidden_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "patch_size": vision.patch_size,
        "image_size": vision.patch_size * vision.merge_size,
        "downsample_ratio": 1 / vision.merge_size,
        "hidden_act": "gelu",
        "norm_type": _NORMS[vision.norm],
        "layer_norm_eps": vision.norm_epsilon,
        "qkv_bias": vision.qkv_bias,
        "qk_normalization": False,
        "initializer_factor": vision.layer_scale_init,
        "initializer_range": vision.init_std,
        "rope_theta": vision.rope_theta,
        "token_order": vision.token_order,
        "window_size": vision.window_size,
        "fullatt_block_indexes": None if full_attention is None else list(full_attention),
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
    }


def _family(llm: Mapping[str, Any]) -> str:
    """The layout of the language model's weights, by its class name."""
    name = (llm.get("architectures") or [None])[0]
    for family, architecture in _ARCHITECTURES.items():
        if name == architecture:
            return family
    expected = " or ".join(sorted(_ARCHITECTURES.values()))
    raise UserError(f"llm_config.architectures is {name!r}, expected {expected}; other families are not supported")


def _rope(llm: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings in either spelling: ``rope_parameters`` (transformers 5) or ``rope_theta`` beside it."""
    scaling, parameters = (llm.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    return {"rope_theta": llm.get("rope_theta", 1e6), **scaling, **parameters}


def _missing(llm: Mapping[str, Any], vision: Mapping[str, Any]) -> Iterable[str]:
    common = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    for section, content, keys in (
        ("llm_config", llm, (*common, "vocab_size", "rms_norm_eps")),
        ("vision_config", vision, (*common, "patch_size", "layer_norm_eps")),
    ):
        yield from (f"{section}.{key} is missing" for key in keys if content.get(key) is None)


def _unsupported(
    config: Mapping[str, Any], llm: Mapping[str, Any], vision: Mapping[str, Any], family: str
) -> Iterable[str]:
    """One line for every value that asks for a computation which the model does not have."""
    rope = _rope(llm)
    # Dynamic NTK only acts on rows longer than max_position_embeddings, which the model refuses anyway.
    ropes: tuple[Any, ...] = (None, "default", "dynamic")
    bias = "attention_bias" if family == "qwen3" else "bias"
    order = vision.get("token_order", "window")
    rules: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("llm_config.hidden_act", llm.get("hidden_act", "silu"), ("silu",)),
        (f"llm_config.{bias}", llm.get(bias, False), (False,)),
        ("llm_config.sliding_window", llm.get("sliding_window"), (None,)),
        ("llm_config.skip_final_norm_weight", llm.get("skip_final_norm_weight", False), (False,)),
        ("llm_config.rope type", rope.get("rope_type", rope.get("type")), ropes),
        ("vision_config.hidden_act", vision.get("hidden_act", "gelu"), ("gelu",)),
        ("vision_config.norm_type", vision.get("norm_type", "rms_norm"), tuple(_NORMS.values())),
        ("vision_config.qk_normalization", vision.get("qk_normalization", False), (False,)),
        ("vision_config.num_channels", vision.get("num_channels", 3), (3,)),
        ("vision_config.token_order", order, ("window", "raster")),
        ("downsample_ratio", config.get("downsample_ratio", 0.5), (0.5,)),
        ("use_llm_lora", config.get("use_llm_lora", 0), (0,)),
        ("use_backbone_lora", config.get("use_backbone_lora", 0), (0,)),
    )
    for name, value, allowed in rules:
        if value not in allowed:
            yield f"{name} is {value!r}, supported: {', '.join(map(repr, allowed))}"
    if family == "qwen3" and llm.get("composed_visual_output_projection", False):
        yield "llm_config.composed_visual_output_projection is only known for InternLM2VEForCausalLM"
    if order == "raster" and vision.get("fullatt_block_indexes") is not None:
        yield "vision_config.fullatt_block_indexes needs vision_config.token_order 'window'"


def _refuse_unnamed(model: ModelConfig) -> None:
    language = model.language
    if language.qk_norm != (language.family == "qwen3"):
        expected = "true" if language.family == "qwen3" else "false"
        raise UserError(
            f"model.language.qk_norm is {str(language.qk_norm).lower()}, but the Hugging Face layout of "
            f"{language.family} models only has {expected}"
        )
    if language.family == "qwen3" and language.composed_visual_output_projection:
        raise UserError(
            "model.language.composed_visual_output_projection is true, but only the internlm2 layout has it; "
            "use family = 'internlm2' or false"
        )
    if language.family == "internlm2" and language.head_dim * language.num_attention_heads != language.hidden_size:
        raise UserError("model.language.head_dim * num_attention_heads must be hidden_size in the internlm2 layout")
    if model.vision.merge_size != 2:
        raise UserError(f"model.vision.merge_size is {model.vision.merge_size}, Hugging Face export supports 2")


def _ordered_ids(ids: Sequence[int] | Mapping[str, int] | None) -> tuple[int, ...]:
    if ids is None:
        raise UserError(
            "the ids of the 12 special tokens are unknown: config.json has no special_token_ids and the folder has no "
            "special_tokens.json, added_tokens.json or tokenizer that names them; give a tokenizer folder"
        )
    if isinstance(ids, Mapping):
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise UserError(f"the special tokens {', '.join(missing)} have no id in the tokenizer; add them")
        ids = [ids[token] for token in SPECIAL_TOKENS]
    if len(set(ids)) != len(SPECIAL_TOKENS):
        raise UserError(f"special_token_ids holds {len(set(ids))} different ids, expected {len(SPECIAL_TOKENS)}")
    return tuple(ids)
