"""Texts from an exported folder: transformers' own loading, batched decoding, greedy or sampled.

Runs the code inside the folder (``trust_remote_code``), so the folder must be one that the caller trusts; never
reaches for a network.
"""

from collections.abc import Sequence
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from navil_megatron.blueprint.chat_template import PLACEHOLDER
from navil_megatron.config.errors import UserError

type Picture = Image.Image | str | Path

_VERSION = tuple(int(number) for number in transformers.__version__.split(".")[:2])
DTYPE_ARGUMENT = "dtype" if _VERSION >= (4, 56) else "torch_dtype"
"""What ``from_pretrained`` calls the type of the weights; 4.56 renamed it, and older versions refuse the new name."""


class Captioner(NamedTuple):
    """A model and its processor."""

    model: Any
    processor: Any


class Sampling(NamedTuple):
    """How the next token is chosen."""

    temperature: float = 0.0  # 0: the likeliest
    top_p: float = 1.0  # of the likeliest tokens with this much probability together

    def options(self) -> dict[str, Any]:
        """As ``generate`` takes them."""
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


GREEDY = Sampling()


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
    images: Sequence[Sequence[Picture]],
    prompt: str = PLACEHOLDER,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    batch_size: int = 16,
) -> list[str]:
    """One text of at most ``max_new_tokens`` for each group of pictures, ``batch_size`` groups at a time.

    Each ``<image>`` in the prompt stands for a picture of the group; without any they come first.

    Raises:
        UserError: A picture cannot be read.
    """
    prompt = as_text(captioner.processor, prompt)
    texts: list[str] = []
    for group in batched(images, batch_size):
        pictures = [[open_picture(image) for image in of_one] for of_one in group]
        texts += generate_texts(captioner, pictures, [prompt] * len(pictures), max_new_tokens, sampling)
    return texts


def as_text(processor: Any, text: str) -> str:
    """Somebody's text as a part of a prompt: control words in it are read as text, as training reads them.

    Raises:
        UserError: It holds some, and the folder's code is too old to tell them apart.
    """
    if hasattr(processor, "plain"):
        return str(processor.plain(text))
    spelled = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.content in text]
    if spelled:
        raise UserError(f"the folder's code reads {', '.join(spelled)} in a text as control tokens: export it anew")
    return text


def generate_texts(
    captioner: Captioner,
    images: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """What follows each prompt, of one batch, padded on the left.

    A prompt holds an ``<image>`` for each of its pictures in ``images``, or neither has any.
    """
    model, processor = captioner
    inputs = processor(images=[list(pictures) for pictures in images], text=list(prompts)).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling.options())
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
