"""The model section and config.json say the same; what the model does not have is refused by name."""

import dataclasses
import json
from typing import Any

import pytest

from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf.hf_config import hf_config_from_model, model_config_from_hf
from navil_megatron.hf.remote_code.configuration_navil_chat import NaViLChatConfig
from tests.unit.hf_examples import FAMILIES, tiny_model


def to_hf(model: ModelConfig) -> dict[str, Any]:
    config = hf_config_from_model(model, dtype="float32", token_ids={}, image_settings={})
    return json.loads(json.dumps(config))


MODELS = {
    **{family: tiny_model(family) for family in FAMILIES},
    "window": tiny_model(
        token_order="window", window_size=4, full_attention_layers=(1,), norm="layernorm", qkv_bias=True
    ),
    "shallow": tiny_model(num_layers=0, rope_theta=500.0, layer_scale_init=0.3),
    "paper output": dataclasses.replace(
        tiny_model("internlm2"),
        language=dataclasses.replace(tiny_model("internlm2").language, composed_visual_output_projection=False),
        connector_norm_epsilon=1e-4,
    ),
    "tied": dataclasses.replace(
        tiny_model(), language=dataclasses.replace(tiny_model().language, tied_embeddings=True)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str) -> None:
    assert model_config_from_hf(to_hf(MODELS[name])) == MODELS[name]


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_through_transformers(name: str) -> None:
    """What ``save_pretrained`` writes after loading is still the same model."""
    saved = json.loads(NaViLChatConfig(**to_hf(MODELS[name])).to_json_string(use_diff=False))
    assert model_config_from_hf(saved) == MODELS[name]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("llm_config", "attention_bias", True),
        ("llm_config", "sliding_window", 4096),
        ("llm_config", "hidden_act", "gelu"),
        ("llm_config", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("llm_config", "architectures", ["LlamaForCausalLM"]),
        ("llm_config", "composed_visual_output_projection", True),
        ("vision_config", "qk_normalization", True),
        ("vision_config", "norm_type", "batch_norm"),
        ("vision_config", "num_channels", 1),
        ("vision_config", "token_order", "spiral"),
        ("vision_config", "fullatt_block_indexes", [0]),
        (None, "downsample_ratio", 0.25),
        (None, "use_llm_lora", 16),
    ],
)
def test_unsupported_value_is_refused_by_name(section: str | None, key: str, value: Any) -> None:
    config = to_hf(tiny_model())
    (config[section] if section else config)[key] = value
    name = "rope type" if key == "rope_scaling" else key
    with pytest.raises(UserError, match=name):
        model_config_from_hf(config)


def test_all_problems_at_once() -> None:
    config = to_hf(tiny_model())
    del config["llm_config"]["vocab_size"]
    config["vision_config"]["qk_normalization"] = True
    with pytest.raises(UserError, match=r"vocab_size is missing.*qk_normalization is True"):
        model_config_from_hf(config)


def test_both_spellings_of_the_rotary_base() -> None:
    config = to_hf(tiny_model())
    del config["llm_config"]["rope_theta"], config["llm_config"]["rope_scaling"]
    config["llm_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 12_345.0}
    assert model_config_from_hf(config).language.rope_theta == 12_345.0


def test_special_token_ids_are_required_and_complete() -> None:
    config = to_hf(tiny_model())
    del config["special_token_ids"]
    with pytest.raises(UserError, match="ids of the 12 special tokens are unknown"):
        model_config_from_hf(config)
    with pytest.raises(UserError, match="<IMG_FRAME_BREAK>"):
        model_config_from_hf(config, {"<img>": 1})


@pytest.mark.parametrize("change", [{"qk_norm": False}, {"composed_visual_output_projection": True}])
def test_model_without_an_hf_layout_is_refused(change: dict[str, Any]) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=next(iter(change))):
        to_hf(dataclasses.replace(model, language=dataclasses.replace(model.language, **change)))
