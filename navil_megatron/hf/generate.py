"""Captions from an exported folder: transformers' own loading, batched greedy decoding.

Runs the code inside the folder (``trust_remote_code``), so the folder must be one that the caller trusts; never
reaches for a network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from navil_megatron.config.errors import UserError

type Picture = Image.Image | str | Path

_VERSION = tuple(int(number) for number in transformers.__version__.split(".")[:2])
DTYPE_ARGUMENT = "dtype" if _VERSION >= (4, 56) else "torch_dtype"
"""What ``from_pretrained`` calls the type of the weights; 4.56 renamed it, and older versions refuse the new name."""


class Captioner(NamedTuple):
    """A model and its processor."""

    model: Any
    processor: Any


def load_for_generation(folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Captioner:
    """Loads an exported folder, offline; ``dtype`` of weights and activations ``None``: as stored.

    Raises:
        UserError: It is not a complete folder with a tokenizer.
    """
    needed = ("config.json", "preprocessor_config.json", "tokenizer.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: give a folder that `convert to-hf` made with a tokenizer"
        )
    settings = {"trust_remote_code": True, "local_files_only": True}
    disable_progress_bar()  # gone in a moment, and two lines in a log
    # "auto" takes the type that the weights were stored with.
    model = AutoModelForImageTextToText.from_pretrained(folder, **{DTYPE_ARGUMENT: dtype or "auto"}, **settings)
    processor = AutoProcessor.from_pretrained(folder, **settings)
    return Captioner(model.to(device).eval(), processor)


def generate_captions(
    captioner: Captioner,
    images: Sequence[Picture],
    prompt: str = "<image>",
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> list[str]:
    """One text of at most ``max_new_tokens`` for each picture, by greedy decoding, ``batch_size`` pictures at a time.

    ``<image>`` in the prompt stands for the picture, which comes first where it is not named.

    Raises:
        UserError: A picture cannot be read.
    """
    texts: list[str] = []
    for start in range(0, len(images), batch_size):
        pictures = [[open_picture(image)] for image in images[start : start + batch_size]]
        texts += generate_texts(captioner, pictures, [prompt] * len(pictures), max_new_tokens)
    return texts


def generate_texts(
    captioner: Captioner, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """What follows each prompt, by greedy decoding of one batch, padded on the left.

    A prompt holds an ``<image>`` for each of its pictures in ``images``, or neither has any.
    """
    model, processor = captioner
    inputs = processor(images=[list(pictures) for pictures in images], text=list(prompts)).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return list(processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True))


def open_picture(image: Picture) -> Image.Image:
    """The picture upright, as the training data has it.

    Raises:
        UserError: It cannot be read.
    """
    if isinstance(image, Image.Image):
        return image
    try:
        return ImageOps.exif_transpose(Image.open(image)).convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise a dozen types
        raise UserError(f"{image} cannot be read as a picture ({error})") from None
