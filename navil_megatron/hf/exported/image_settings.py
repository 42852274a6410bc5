"""How pictures become patches, and where decoding stops: the data section <-> the small JSON files of an HF folder."""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from navil_megatron.blueprint.chat_template import TURN_TOKENS
from navil_megatron.config.data import DataConfig
from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.json_file import read_json
from navil_megatron.hf.exported.tokenizer_files import vocabulary
from navil_megatron.hf.hf_config import AUTO_MAP

_IMAGE_SETTINGS = {
    "min_pixels": "min_image_pixels",
    "max_pixels": "max_image_pixels",
    "multi_scale": "multi_scale",
    "scale_ratio": "scale_ratio",
    "share_shrunk_limit": "share_shrunk_limit",
}
"""Image processor settings -> fields of the data section."""
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(DataConfig)}


def image_settings_to_hf(data: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The keys of ``config.json`` that say how pictures become patches, from a config's data section."""
    settings, patch_area = {**_DEFAULTS, **data}, model.vision.patch_size**2
    return {
        "min_dynamic_patch": settings["min_image_pixels"] // patch_area,
        "max_dynamic_patch": settings["max_image_pixels"] // patch_area,
        "scale_downsample_ratio": settings["scale_ratio"],
    }


def preprocessor_config(data: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of a model: the image processor's settings, as in training."""
    return {
        "auto_map": {name: AUTO_MAP[name] for name in ("AutoProcessor", "AutoImageProcessor")},
        "processor_class": "NaViLProcessor",
        "image_processor_type": "NaViLImageProcessor",
        "patch_size": model.vision.patch_size,
        "merge_size": model.vision.merge_size,
        **{key: data.get(name, _DEFAULTS[name]) for key, name in _IMAGE_SETTINGS.items()},
    }


def image_settings_from_hf(folder: Path, config_json: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """What an HF folder tells of the data section; the authors' folders have no ``preprocessor_config.json``.

    Raises:
        UserError: A setting has a value that it cannot have; all of them are named.
    """
    area = model.vision.patch_size**2
    patches = [
        ("min_image_pixels", "config.json", "min_dynamic_patch", config_json.get("min_dynamic_patch", 256)),
        ("max_image_pixels", "config.json", "max_dynamic_patch", config_json.get("max_dynamic_patch", 24_576)),
    ]
    ratio = config_json.get("scale_downsample_ratio", 0.7071)
    settings = {"scale_ratio": ("scale_ratio", "config.json", "scale_downsample_ratio", ratio)}
    for file in ("preprocessor_config.json", "processor_config.json"):  # ours, and what save_pretrained makes of it
        if (folder / file).is_file():
            content = read_json(folder / file)
            stated = content.get("image_processor", content)
            if not isinstance(stated, Mapping):
                raise UserError(f"{folder / file}: image_processor is {stated!r}, expected an object")
            settings |= {ours: (ours, file, key, stated[key]) for key, ours in _IMAGE_SETTINGS.items() if key in stated}
    problems = []
    for ours, file, key, value in (*patches, *settings.values()):
        kind = type(_DEFAULTS[ours])
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is not bool and not 0 < value < math.inf):
            expected = "true or false" if kind is bool else f"a number ({kind.__name__}) above 0"
            problems.append(f"{file}: {key} is {value!r}, expected {expected}")
    if problems:
        raise UserError(f"the image settings of {folder} cannot be used: {'; '.join(problems)}")
    return {ours: value * area for ours, _, _, value in patches} | {ours: entry[-1] for ours, entry in settings.items()}


MAX_NEW_TOKENS = 1024
"""Longest answer where the caller names none, as in the authors' demo."""


def generation_config(token_ids: Mapping[str, int | None], tokenizer: Path | None = None) -> dict[str, Any]:
    """The ``generation_config.json``: greedy, until the end token, or the end of a turn where the tokenizer has one."""
    end_of_turn = None if tokenizer is None else vocabulary(tokenizer).get(TURN_TOKENS[1])
    stops = [*dict.fromkeys(i for i in (token_ids.get("eos_token_id"), end_of_turn) if i is not None)]
    padding = token_ids.get("pad_token_id")
    found = {
        "bos_token_id": token_ids.get("bos_token_id"),
        "eos_token_id": stops if len(stops) > 1 else stops[0] if stops else None,
        # Batches must be filled up with something: without a pad token with the end token, as transformers does.
        "pad_token_id": stops[0] if padding is None and stops else padding,
    }
    known = {name: value for name, value in found.items() if value is not None}
    return {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, **known}
