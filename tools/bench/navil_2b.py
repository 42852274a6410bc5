"""NaViL-2B at its real sizes, from its example: nothing here is built, only counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from navil_megatron.config.load import load_config
from navil_megatron.config.run import NaViLConfig

_EXAMPLE = load_config(Path(__file__).resolve().parents[2] / "examples" / "navil_2b" / "stage1_1.toml")
NAVIL_2B = _EXAMPLE.model


def navil_2b_run(**data: Any) -> NaViLConfig:
    """A run of NaViL-2B with these settings of its data section."""
    return replace(_EXAMPLE, data=replace(_EXAMPLE.data, **data))
