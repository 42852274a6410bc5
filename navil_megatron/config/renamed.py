"""Settings that have another name than they had: refused with the new one in a config, read in a checkpoint."""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "data.validation_sources": "evaluation.sources",
    "training.evaluate_every_steps": "evaluation.every_steps",
    "training.evaluate_swapped_images": "evaluation.swapped_images",
    "training.precision": "precision.type",
    "training.fp8": "precision.fp8",
    "training.fp8_first_last_layers_bf16": "precision.fp8_first_last_layers_bf16",
    "training.fp8_encoder": "precision.fp8_encoder",
}
"""Dotted setting, as it was -> as it is."""


def with_new_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A config as a checkpoint holds it, which may be older than a name, under the names of today."""
    tables = {name: dict(table) if isinstance(table, Mapping) else table for name, table in stored.items()}
    for old, new in RENAMED.items():
        (section, field), (new_section, new_field) = old.split("."), new.split(".")
        if isinstance(tables.get(section), dict) and field in tables[section]:
            tables.setdefault(new_section, {})[new_field] = tables[section].pop(field)
    return tables
