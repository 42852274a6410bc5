"""How pictures become patches, and where decoding stops: the data section <-> the small JSON files of an HF folder."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from navil_megatron.config.schema import DataConfig, ModelConfig
from navil_megatron.hf.hf_config import AUTO_MAP

_IMAGE_SETTINGS = {
    "min_pixels": "min_image_pixels",
    "max_pixels": "max_image_pixels",
    "multi_scale": "multi_scale",
    "scale_ratio": "scale_ratio",
    "share_shrunk_limit": "share_shrunk_limit",
}
"""Image processor settings -> fields of the data section."""


def image_settings_to_hf(data: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The keys of ``config.json`` that say how pictures become patches, from a config's data section."""
    patch_area = model.vision.patch_size**2
    return {
        "min_dynamic_patch": _setting(data, "min_image_pixels") // patch_area,
        "max_dynamic_patch": _setting(data, "max_image_pixels") // patch_area,
        "scale_downsample_ratio": _setting(data, "scale_ratio"),
    }


def preprocessor_config(data: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of a model: the image processor's settings, as in training."""
    return {
        "auto_map": {name: AUTO_MAP[name] for name in ("AutoProcessor", "AutoImageProcessor")},
        "processor_class": "NaViLProcessor",
        "image_processor_type": "NaViLImageProcessor",
        "patch_size": model.vision.patch_size,
        "merge_size": model.vision.merge_size,
        **{key: _setting(data, name) for key, name in _IMAGE_SETTINGS.items()},
    }


def image_settings_from_hf(folder: Path, config_json: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """What an HF folder tells of the data section; the authors' folders have no ``preprocessor_config.json``."""
    patch_area = model.vision.patch_size**2
    settings = {
        "min_image_pixels": config_json.get("min_dynamic_patch", 256) * patch_area,
        "max_image_pixels": config_json.get("max_dynamic_patch", 24_576) * patch_area,
        "scale_ratio": config_json.get("scale_downsample_ratio", 0.7071),
    }
    for name in ("preprocessor_config.json", "processor_config.json"):  # ours, and what save_pretrained makes of it
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            ours = content.get("image_processor", content)
            settings |= {theirs: ours[key] for key, theirs in _IMAGE_SETTINGS.items() if key in ours}
    return settings


def generation_config(token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The ``generation_config.json``: greedy, and where to stop."""
    return {"do_sample": False, **token_ids}


def _setting(data: Mapping[str, Any], name: str) -> Any:
    """A value of the data section, or the default that the section's class has."""
    defaults = {field.name: field.default for field in fields(DataConfig)}
    return data.get(name, defaults[name])
