"""Our language section <-> the language model's part of a Hugging Face config, a NaViL's or a pretrained LLM's.

Both spellings of the rotary settings are read: ``rope_theta`` beside ``rope_scaling`` (transformers 4) and
``rope_parameters`` (transformers 5). Dynamic NTK scaling only acts on rows longer than ``max_position_embeddings``,
which the model refuses anyway, so it is read as none.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from navil_megatron.config.language import FAMILIES, LanguageConfig
from navil_megatron.config.load import config_to_dict, section_from_dict
from navil_megatron.config.vision import VisionConfig
from navil_megatron.hf.llm.families import HF_FAMILIES


class Ours(str):
    """Name of one of our settings, in a table of what stands under each key of a Hugging Face config."""


_LANGUAGE = {
    "num_hidden_layers": Ours("num_layers"),
    "hidden_size": Ours("hidden_size"),
    "intermediate_size": Ours("ffn_hidden_size"),
    "num_attention_heads": Ours("num_attention_heads"),
    "num_key_value_heads": Ours("num_query_groups"),
    "head_dim": Ours("head_dim"),
    "vocab_size": Ours("vocab_size"),
    "hidden_act": "silu",
    "rms_norm_eps": Ours("norm_epsilon"),
    "rope_theta": Ours("rope_theta"),
    "rope_scaling": None,
    "max_position_embeddings": Ours("max_position_embeddings"),
    "tie_word_embeddings": Ours("tied_embeddings"),
    "initializer_range": Ours("init_std"),
    "use_cache": True,
}
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "rms_norm_eps")
"""Keys without which the language model is not known."""

_LLAMA3 = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_length",
}
"""Settings of rope type ``llama3`` -> ours."""
_ROPE_KEYS = {*_LLAMA3, "rope_theta", "rope_type", "type", "partial_rotary_factor"}


def settings_from_hf(table: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """Those of our settings that a section of a Hugging Face config holds."""
    return {ours: section[key] for key, ours in table.items() if isinstance(ours, Ours) and key in section}


def settings_to_hf(table: Mapping[str, Any], settings: LanguageConfig | VisionConfig) -> dict[str, Any]:
    """The section of a Hugging Face config that holds our settings."""
    values = config_to_dict(settings)
    return {key: values[value] if isinstance(value, Ours) else value for key, value in table.items()}


def language_from_hf(
    llm: Mapping[str, Any], family: str, *, composed: bool, default_theta: float, source: str
) -> LanguageConfig:
    """The language section, of a config without ``language_problems``; ``source`` names the config in errors.

    Where the config does not say, ``composed`` is ``composed_visual_output_projection`` and ``default_theta`` is
    ``rope_theta``.

    Raises:
        UserError: A value has another type than it should.
    """
    heads = llm["num_attention_heads"]
    rope = _rope(llm)
    values = settings_from_hf(_LANGUAGE, llm) | {
        "family": family,
        "num_query_groups": llm.get("num_key_value_heads") or heads,
        "head_dim": llm.get("head_dim") or llm["hidden_size"] // heads,
        **FAMILIES[family].fixed,
        "composed_visual_output_projection": llm.get("composed_visual_output_projection", composed),
        "rope_theta": rope.get("rope_theta", default_theta),
        "num_experts": llm.get("num_experts") or 1,
        "experts_per_token": llm.get("num_experts_per_tok") or 1,
        "tied_embeddings": llm.get("tie_word_embeddings") or False,
    }
    if _rope_type(rope) == "llama3":
        values |= {ours: rope[theirs] for theirs, ours in _LLAMA3.items()}
    return section_from_dict(LanguageConfig, values, source)


def language_to_hf(language: LanguageConfig) -> dict[str, Any]:
    """The ``llm_config`` of a NaViL."""
    family = HF_FAMILIES[language.family]
    rope_scaling = None
    if language.rope_scaling_factor is not None:
        rope_scaling = {"rope_type": "llama3"} | {theirs: getattr(language, ours) for theirs, ours in _LLAMA3.items()}
    extra: dict[str, Any] = {}
    if language.num_experts > 1:
        extra = {"num_experts": language.num_experts, "num_experts_per_tok": language.experts_per_token}
    if language.family.startswith("qwen"):
        # Their classes have windows, on by default from transformers' point of view.
        extra |= {"sliding_window": None, "use_sliding_window": False}
    if FAMILIES[language.family].may_compose_visual_output:
        extra["composed_visual_output_projection"] = language.composed_visual_output_projection
    return {
        "architectures": [family.architecture],
        "model_type": language.family,
        **settings_to_hf(_LANGUAGE, language),
        "rope_scaling": rope_scaling,
        **family.settings,
        **extra,
    }


def language_problems(llm: Mapping[str, Any], family: str, section: str = "") -> Iterator[str]:
    """One line for every size that is missing and every value that asks for a computation which the model lacks.

    ``section`` precedes each key, e.g. ``llm_config.``; it is empty for a bare LLM.
    """
    yield from (f"{section}{key} is missing" for key in _SIZES if llm.get(key) is None)
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "skip_final_norm_weight": (False,),
        "use_mrope": (False,),
        "quantization_config": (None,),
        **dict.fromkeys(("num_local_experts", "n_routed_experts"), (0,)),
        # A NaViL may hold several experts of each modality; a pretrained mixture of experts cannot start one.
        **({} if section else {"num_experts": (0,)}),
        **{key: (value,) for key, value in HF_FAMILIES[family].settings.items()},
    }
    for key, values in allowed.items():
        if llm.get(key) is not None and llm[key] not in values:
            yield f"{section}{key} is {llm[key]!r}, supported: {', '.join(map(repr, values))}"
    kinds = llm.get("layer_types") or []
    other = sorted({str(kind) for kind in kinds if kind != "full_attention"})
    if other:
        yield f"{section}layer_types holds {', '.join(other)}, supported: full_attention"
    if llm.get("composed_visual_output_projection") and not FAMILIES[family].may_compose_visual_output:
        yield f"{section}composed_visual_output_projection is true, but {HF_FAMILIES[family].title} models have none"
    yield from _rope_problems(llm, section)


def _rope_problems(llm: Mapping[str, Any], section: str) -> Iterator[str]:
    rope = _rope(llm)
    kind = _rope_type(rope)
    if kind not in ("default", "dynamic", "llama3"):
        yield f"{section}rope type is {kind!r}, supported: 'default', 'dynamic', 'llama3'"
        return
    unknown = sorted(key for key, value in rope.items() if key not in _ROPE_KEYS and value is not None)
    if unknown:
        yield f"{section}rope settings {', '.join(unknown)} are unknown, supported: {', '.join(sorted(_ROPE_KEYS))}"
    partial = rope.get("partial_rotary_factor", llm.get("partial_rotary_factor"))
    if partial not in (None, 1):
        yield f"{section}partial_rotary_factor is {partial!r}, supported: 1.0"
    if kind == "llama3":
        yield from (f"{section}rope setting {key} is missing" for key in _LLAMA3 if rope.get(key) is None)


def _rope(llm: Mapping[str, Any]) -> dict[str, Any]:
    theta = {} if llm.get("rope_theta") is None else {"rope_theta": llm["rope_theta"]}
    return {**theta, **(llm.get("rope_scaling") or {}), **(llm.get("rope_parameters") or {})}


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type") or "default"
