"""Exported folders for the tests of what users do with them.

``python -m tests.unit.hf_folders DIRECTORY`` exports one folder per family; with ``NAVIL_EXPORTED_DIR=DIRECTORY`` the
tests read those, so that a folder written under one version of transformers is loaded under another.
"""

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from navil_megatron.hf.export import convert_to_hf
from tests.unit.hf_examples import FAMILIES, tiny_model, tiny_tokenizer, with_tokenizer, write_checkpoint


def exported_folder(root: Path, family: str) -> Path:
    """The folder of a family: made before, or exported to ``root`` now."""
    made = os.environ.get("NAVIL_EXPORTED_DIR")
    return Path(made) / family / family if made else export_example(root, family)


def export_example(root: Path, family: str) -> Path:
    """A random checkpoint of a family with a tokenizer, exported. Small pictures have several scales."""
    tokenizer = tiny_tokenizer(root / "tokenizer")
    data = {"tokenizer": str(root / "tokenizer"), "min_image_pixels": 1024, "max_image_pixels": 8192}
    model = with_tokenizer(tiny_model(family), tokenizer)
    write_checkpoint(root / "checkpoint", model, data=data)
    # transformers 4 names the code that it loads after the folder, so the folders have different names.
    convert_to_hf(root / "checkpoint", root / family)
    return root / family


def picture(height: int, width: int) -> Image.Image:
    """Noise, different for every height."""
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(66, 100), picture(100, 40), picture(33, 33)]
"""The first has two scales within the limits of the example folders, the others one."""


if __name__ == "__main__":
    for name in FAMILIES:
        export_example(Path(sys.argv[1]) / name, name)
