"""The model section of our config <-> a Hugging Face ``config.json`` in the authors' layout.

Every size, bias and norm kind is read, none assumed. A value that would change the computation in a way the model
does not have is refused by name; values that only steer the authors' training or demo are left alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.config.language import FAMILIES, family_rules
from navil_megatron.config.load import section_from_dict
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.config.vision import VisionConfig
from navil_megatron.hf.llm.families import HF_FAMILIES
from navil_megatron.hf.llm.language_config import (
    Ours,
    language_from_hf,
    language_problems,
    language_to_hf,
    settings_from_hf,
    settings_to_hf,
)

MODEL_TYPE = "navil_chat"
_NORMS = {"rmsnorm": "rms_norm", "layernorm": "layer_norm"}
_VISION = {
    "architectures": None,
    "model_type": "navil_vit",
    "num_hidden_layers": Ours("num_layers"),
    "hidden_size": Ours("hidden_size"),
    "intermediate_size": Ours("ffn_hidden_size"),
    "num_attention_heads": Ours("num_attention_heads"),
    "num_channels": 3,
    "patch_size": Ours("patch_size"),
    "image_size": None,
    "downsample_ratio": None,
    "hidden_act": "gelu",
    "norm_type": None,
    "layer_norm_eps": Ours("norm_epsilon"),
    "qkv_bias": Ours("qkv_bias"),
    "qk_normalization": False,
    "initializer_factor": Ours("layer_scale_init"),
    "initializer_range": Ours("init_std"),
    "rope_theta": Ours("rope_theta"),
    "token_order": Ours("token_order"),
    "window_size": Ours("window_size"),
    "fullatt_block_indexes": Ours("full_attention_layers"),
    "attention_dropout": 0.0,
    "drop_path_rate": 0.0,
    "dropout": 0.0,
}
"""``vision_config`` as we write it: our setting under each key, or one value for all models."""
_VISION_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "layer_norm_eps"),
)
"""Keys without which the encoder is not known."""
_SUPPORTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "vision_config": {
        "hidden_act": ("gelu",),
        "norm_type": tuple(_NORMS.values()),
        "qk_normalization": (False,),
        "num_channels": (3,),
        "token_order": ("window", "raster"),
    },
    # The eager class of the authors windows the mask as soon as a window is named, used or not.
    "llm_config": {"sliding_window": (None,)},
    "": {"downsample_ratio": (0.5,), "use_llm_lora": (0,), "use_backbone_lora": (0,)},
}
"""Section, key -> the values that the model has; a config that lacks the key means the first."""
AUTO_MAP = {
    "AutoConfig": "configuration_navil_chat.NaViLChatConfig",
    **dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"), "modeling_navil_chat.NaViL"),
    "AutoProcessor": "processing_navil_chat.NaViLProcessor",
    "AutoImageProcessor": "processing_navil_chat.NaViLImageProcessor",
}
"""Which class of the folder's own code each transformers ``Auto`` class loads."""


def model_config_from_hf(
    config_json: Mapping[str, Any], special_token_ids: Sequence[int] | Mapping[str, int] | None = None
) -> ModelConfig:
    """The model section for a parsed ``config.json``; whether such a model works is not asked.

    ``special_token_ids`` stand in the order of ``SPECIAL_TOKENS`` or by name; ``None``: taken from the config.

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
    if problems := [*language_problems(llm, family, "llm_config."), *_problems(config_json)]:
        raise UserError("config.json cannot be converted: " + "; ".join(problems))
    composed = FAMILIES[family].may_compose_visual_output  # as the authors' code does where their files do not say
    encoder = {"token_order": "window", **settings_from_hf(_VISION, vision)}
    encoder["merge_size"] = round(1 / config_json.get("downsample_ratio", 0.5))
    encoder["norm"] = "rmsnorm" if vision.get("norm_type", "rms_norm") == "rms_norm" else "layernorm"
    return ModelConfig(
        language=language_from_hf(llm, family, composed=composed, default_theta=1e6, source="config.json: llm_config"),
        vision=section_from_dict(VisionConfig, encoder, "config.json: vision_config"),
        special_token_ids=ordered_ids(
            config_json.get("special_token_ids") if special_token_ids is None else special_token_ids
        ),
        connector_norm_epsilon=config_json.get("connector_norm_eps", 1e-5),
    )


def hf_config_from_model(
    model: ModelConfig, *, dtype: str, token_ids: Mapping[str, int | None], image_settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The ``config.json`` of a model, with what ``read_token_ids`` and ``image_settings_to_hf`` give.

    Raises:
        UserError: The family's HF layout has no place for a setting of the model.
    """
    if problems := list(_without_place(model)):
        raise UserError("the model has no Hugging Face layout: " + "; ".join(problems))
    ids = {name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision, token_side = model.vision, model.vision.patch_size * model.vision.merge_size
    sizes = {"image_size": token_side, "downsample_ratio": 1 / vision.merge_size, "norm_type": _NORMS[vision.norm]}
    return {
        "architectures": ["NaViL"],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        "anyres_image_size": True,
        "connector_norm_eps": model.connector_norm_epsilon,
        "downsample_ratio": 1 / vision.merge_size,
        "force_image_size": token_side,
        "ps_version": "v1",
        "select_layer": -1,
        "tie_word_embeddings": model.language.tied_embeddings,
        "torch_dtype": dtype,
        **ids,
        **image_settings,
        "special_token_ids": list(model.special_token_ids),
        "llm_config": language_to_hf(model.language) | ids,
        "vision_config": settings_to_hf(_VISION, vision) | sizes,
    }


def _family(llm: Mapping[str, Any]) -> str:
    """The layout of the language model's weights, by its class name."""
    name = (llm.get("architectures") or [None])[0]
    for family, names in HF_FAMILIES.items():
        if name == names.architecture:
            return family
    expected = ", ".join(sorted(names.architecture for names in HF_FAMILIES.values()))
    raise UserError(
        f"llm_config.architectures is {name!r}, expected one of {expected}; other families are not supported"
    )


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    """One line for every size of the encoder that is missing, and every value that asks for what the model lacks."""
    vision = config["vision_config"]
    yield from (f"vision_config.{key} is missing" for key in _VISION_SIZES if vision.get(key) is None)
    for section, rules in _SUPPORTED.items():
        for key, allowed in rules.items():
            value = (config[section] if section else config).get(key, allowed[0])
            if value not in allowed:
                yield f"{section}{'.' * bool(section)}{key} is {value!r}, supported: {', '.join(map(repr, allowed))}"
    if vision.get("token_order") == "raster" and vision.get("fullatt_block_indexes") is not None:
        yield "vision_config.fullatt_block_indexes needs vision_config.token_order 'window'"


def _without_place(model: ModelConfig) -> Iterator[str]:
    """One line for every setting that no Hugging Face folder can hold."""
    language = model.language
    yield from family_rules(language)
    if language.family == "internlm2" and language.head_dim * language.num_attention_heads != language.hidden_size:
        yield "model.language.head_dim * num_attention_heads must be hidden_size in the internlm2 layout"
    if model.vision.merge_size != 2:
        yield f"model.vision.merge_size is {model.vision.merge_size}, Hugging Face export supports 2"


def ordered_ids(ids: Sequence[int] | Mapping[str, int] | None) -> tuple[int, ...]:
    """The special tokens' ids in the order of ``SPECIAL_TOKENS``.

    Raises:
        UserError: They are unknown, incomplete or not different from each other.
    """
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
