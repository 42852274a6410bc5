"""Images and text to model inputs: scales, patches, and the tokens that stand for an image.

The rules of the authors' preprocessing, by Pillow and NumPy alone: bicubic resize between two
areas with the aspect ratio kept, zero padding on the right and bottom *before* normalisation, smaller scales first.
"""

import math
import re
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

PLACEHOLDER = "<image>"
IMAGE_WORDS = ("<img>", "</img>", "<IMG_CONTEXT>", "<IMG_LINE_BREAK>", "<IMG_FRAME_BREAK>", "<img_uncond>")
"""Control tokens that only pictures may bring into a prompt."""
_IMAGE_WORDS = re.compile("|".join(IMAGE_WORDS))
MAX_ASPECT_RATIO = 200
_AS_TEXT = "\ufdd0"
"""Stands inside a control word that somebody wrote, until the text is encoded: so it reads as text, as in training."""
_IMAGE_SOURCES = ("image", "url", "path", "base64", "image_url")
"""Keys under which a content part of a chat may name its picture."""
_TOKENIZER_SETTINGS = ("padding", "padding_side", "truncation", "max_length", "add_special_tokens", "return_tensors")
"""What ``apply_chat_template`` hands on to the processor's call; the rest is for the template."""
_NORMALISED = ((np.arange(256) / 255).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
"""[256] float32: what each 8-bit value becomes."""


def bounded_size(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The size between two areas with its aspect ratio kept; a size already inside is untouched."""
    area = height * width
    if area > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        return max(1, math.floor(height / shrink)), max(1, math.floor(width / shrink))
    if area < min_pixels:
        grow = math.sqrt(min_pixels / area)
        return math.ceil(height * grow), math.ceil(width * grow)
    return height, width


def image_tokens(grids: list[list[int]], merge_size: int) -> str:
    """The text of one image: line breaks end rows, frame breaks end scales and frames."""
    scales = (
        ("<IMG_CONTEXT>" * (width // merge_size) + "<IMG_LINE_BREAK>") * (height // merge_size) + "<IMG_FRAME_BREAK>"
        for frames, height, width in grids
        for _ in range(frames)
    )
    return f"<img>{''.join(scales)}</img>"


class NaViLImageProcessor(BaseImageProcessor):
    """Pictures to normalised patches in merge-block order, every picture at one or several scales."""

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_grid_thw"]

    def __init__(
        self,
        patch_size: int = 16,
        merge_size: int = 2,
        min_pixels: int = 65_536,
        max_pixels: int = 6_291_456,
        multi_scale: bool = True,
        scale_ratio: float = 0.7071,
        share_shrunk_limit: bool = False,
        **kwargs: Any,
    ) -> None:
        """Settings as in training.

        Args:
            patch_size: Side of a patch, in pixels.
            merge_size: Patches along one side of the block that becomes one visual token.
            min_pixels: Smallest area of a scale, before padding.
            max_pixels: Largest area of an image, before padding.
            multi_scale: Add smaller scales.
            scale_ratio: Side ratio of successive scales.
            share_shrunk_limit: The limit left by one image's smallest scale caps the next image of the same text, as
                in the authors' demo.
            **kwargs: Bookkeeping keys of transformers.
        """
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.multi_scale = multi_scale
        self.scale_ratio = scale_ratio
        self.share_shrunk_limit = share_shrunk_limit

    def plan(self, sizes: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """The (height, width) to resize each image of one text to, scale by scale, small to large."""
        plans = []
        limit: float = self.max_pixels
        for height, width in sizes:
            if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
                raise ValueError(f"an image of {height} x {width} pixels has an aspect ratio beyond {MAX_ASPECT_RATIO}")
            scales, shrunk_limit = self._plan_scales(height, width, limit)
            plans.append(scales)
            if self.share_shrunk_limit:
                limit = shrunk_limit
        return plans

    def grid(self, height: int, width: int) -> list[int]:
        """Frames, patch rows and patch columns of a resized picture, padded to whole blocks."""
        block = self.patch_size * self.merge_size
        return [1, math.ceil(height / block) * self.merge_size, math.ceil(width / block) * self.merge_size]

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **unused: Any) -> BatchFeature:
        """Patches and grids of the images of one text.

        Args:
            images: One picture or several: Pillow images, arrays and tensors [h, w, 3] or [3, h, w] of uint8, or
                paths and addresses.
            return_tensors: Kept for transformers; the result holds torch tensors.
            **unused: Other settings that transformers passes along.

        Returns:
            ``pixel_values`` [p, 3, patch, patch] float32, ``image_grid_thw`` [num_scales, 3] and ``num_scales``
            [images].
        """
        pictures = [_as_rgb(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
        plans = self.plan([(picture.height, picture.width) for picture in pictures])
        scales = [(picture, size) for picture, plan in zip(pictures, plans, strict=True) for size in plan]
        patches = [_NORMALISED[self._patches(picture, *size)] for picture, size in scales]
        side = self.patch_size
        return BatchFeature(
            {
                "pixel_values": torch.from_numpy(np.concatenate([np.empty((0, 3, side, side), np.float32), *patches])),
                "image_grid_thw": torch.tensor([self.grid(*size) for _, size in scales]).reshape(-1, 3),
                "num_scales": torch.tensor([len(plan) for plan in plans]),
            }
        )

    def _plan_scales(self, height: int, width: int, limit: float) -> tuple[list[tuple[int, int]], float]:
        """The scales of one image, and the area limit in force when the search for more ended."""
        scales = [bounded_size(height, width, self.min_pixels, limit)]
        while self.multi_scale:
            num_patches = math.prod(self.grid(*scales[0]))
            limit = num_patches * self.patch_size**2 * self.scale_ratio**2
            if limit < self.min_pixels:
                break
            smaller = bounded_size(height, width, self.min_pixels, limit)
            if math.prod(self.grid(*smaller)) >= num_patches:
                break
            scales.insert(0, smaller)
        return scales, limit

    def _patches(self, picture: Image.Image, height: int, width: int) -> np.ndarray:
        """One scale as [p, 3, patch, patch] uint8: blocks in raster order, patches in raster order inside each."""
        if (picture.height, picture.width) != (height, width):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        _, rows, columns = self.grid(height, width)
        side, merge = self.patch_size, self.merge_size
        canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
        canvas[:height, :width] = np.asarray(picture)
        split = canvas.reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
        return split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, side, side)


def _as_rgb(image: Any) -> Image.Image:
    """Pillow's RGB of a picture, upright as in training; transparency is dropped, not blended."""
    if isinstance(image, str):  # a path, an address or base64, as everywhere in transformers
        image = load_image(image)
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise ValueError(f"an image is an array of {array.dtype}, expected uint8 values from 0 to 255")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    return Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[2] == 1 else array).convert("RGB")


class NaViLProcessor(ProcessorMixin):
    """Text with ``<image>`` placeholders and pictures to the inputs of ``NaViL.forward`` and ``generate``."""

    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers 4 loads the parts by these names
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        """Joins the two parts."""
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """What the model's forward takes of the result."""
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_thw"]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str | None = None,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of one text or a batch.

        Args:
            images: Pictures of the text; for a batch a list per text, or one flat list in order of the placeholders.
            text: The prompt or prompts. Every ``<image>`` becomes the tokens of the next picture and nothing else; a
                text without placeholders gets its pictures in front.
            return_tensors: ``"pt"``; the result always holds torch tensors.
            padding: As in tokenizers; default: pad where there are several texts.
            padding_side: ``"left"`` so that generation goes on where each prompt ends.
            **kwargs: Further settings of the tokenizer.

        Returns:
            ``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values`` and ``image_grid_thw``.
        """
        texts = [text or ""] if text is None or isinstance(text, str) else list(text)
        expanded, pixel_values, grids = [], [], []
        for prompt, pictures in zip(texts, _pictures_of_texts(images, texts), strict=True):
            layout = []
            if pictures:
                features = self.image_processor.preprocess(pictures)
                pixel_values.append(features["pixel_values"])
                grids.append(features["image_grid_thw"])
                layout = [part.tolist() for part in features["image_grid_thw"].split(features["num_scales"].tolist())]
            expanded.append(self.expand(prompt, layout))
        if padding is None:
            padding = len(texts) > 1
        ignored = {*_TOKENIZER_SETTINGS, "return_dict", "images_kwargs", "text_kwargs"}
        unknown = [name for name in kwargs if name not in ignored and kwargs[name] is not None]
        if unknown:
            raise ValueError(f"the processor takes images and text, it cannot use {', '.join(unknown)}")
        settings = {name: kwargs[name] for name in _TOKENIZER_SETTINGS if name in kwargs}
        if any(_AS_TEXT in prompt for prompt in expanded):
            ids = [self._encode_marked(prompt, settings.get("add_special_tokens", True)) for prompt in expanded]
            if settings.get("truncation"):
                ids = [prompt[: settings.get("max_length")] for prompt in ids]
            encoded = self.tokenizer.pad(
                {"input_ids": ids, "attention_mask": [[1] * len(prompt) for prompt in ids]},
                padding=padding,
                padding_side=padding_side,
                max_length=settings.get("max_length"),
                return_tensors="pt",
            )
        else:
            encoded = self.tokenizer(
                expanded,
                padding=padding,
                padding_side=padding_side,
                return_tensors="pt",
                return_token_type_ids=False,
                **settings,
            )
        data = dict(encoded)
        if grids:
            data |= {"pixel_values": torch.cat(pixel_values), "image_grid_thw": torch.cat(grids)}
        return BatchFeature(data)

    def plain(self, text: str) -> str:
        """Somebody's text as a part of a prompt: control words in it are read as text, ``<image>`` excepted."""
        return _marked(self._control_words, text)

    @property  # not kept: whatever a processor keeps is saved with it
    def _control_words(self) -> "re.Pattern[str]":
        words = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(re.escape(word) for word in sorted({*words, *IMAGE_WORDS}, key=len, reverse=True)))

    def _encode_marked(self, prompt: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt with marked words: between control tokens, each stretch as training encodes it."""
        around = self.tokenizer("x", add_special_tokens=add_special_tokens, return_special_tokens_mask=True)
        mask = around["special_tokens_mask"]
        first, last = mask.index(0), len(mask) - mask[::-1].index(0)
        ids, end = list(around["input_ids"][:first]), 0
        for found in [*self._control_words.finditer(prompt), None]:
            stretch = prompt[end : found.start() if found else None].replace(_AS_TEXT, "")
            if stretch:
                ids += self.tokenizer(stretch, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if found:
                ids.append(self.tokenizer.convert_tokens_to_ids(found[0]))
                end = found.end()
        return ids + list(around["input_ids"][last:])

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's; transformers 4 leaves it to each processor."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The prompt of a conversation, or the model inputs with its images in place.

        Every version of transformers has its own idea of what content may look like; this takes the same in all:
        a string, or a list of parts ``{"type": "text", "text": ...}`` and ``{"type": "image", ...}``.

        Args:
            conversation: A list of messages with ``role`` and ``content``, or a list of such lists.
            chat_template: A template to use in place of the folder's.
            tokenize: Give model inputs; the picture of an image part is its ``image``, ``url``, ``path`` or ``base64``.
            return_dict: With ``tokenize``: all inputs, not only ``input_ids``.
            processor_kwargs: Settings of the processor's call, e.g. ``padding``.
            **kwargs: ``add_generation_prompt``, ``continue_final_message`` and variables of the template.
        """
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask is not supported: the template marks no answers")
        settings = {name: kwargs.pop(name) for name in _TOKENIZER_SETTINGS if name in kwargs} | (processor_kwargs or {})
        is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
        chats, images = zip(*map(self._split_chat, conversation if is_batch else [conversation]), strict=True)
        prompts = super().apply_chat_template(list(chats), chat_template=chat_template, tokenize=False, **kwargs)
        if not tokenize:
            return prompts if is_batch else prompts[0]
        if self.tokenizer.bos_token and prompts[0].startswith(self.tokenizer.bos_token):
            settings["add_special_tokens"] = False  # as transformers does: the template wrote them
        inputs = self(images=[list(pictures) for pictures in images], text=prompts, **settings)
        return inputs if return_dict else inputs["input_ids"]

    def expand(self, text: str, grids_of_images: list[list[list[int]]]) -> str:
        """The text with the tokens of each image, given by the grids of its scales, in place of its placeholder."""
        text = _marked(_IMAGE_WORDS, text)
        num_placeholders = text.count(PLACEHOLDER)
        if num_placeholders == 0:
            num_placeholders = len(grids_of_images)
            text = PLACEHOLDER * num_placeholders + text
        if num_placeholders != len(grids_of_images):
            raise ValueError(
                f"{num_placeholders} {PLACEHOLDER} placeholders in the text but {len(grids_of_images)} images"
            )
        pieces = text.split(PLACEHOLDER)
        merge_size = self.image_processor.merge_size
        return pieces[0] + "".join(
            image_tokens(grids, merge_size) + piece for grids, piece in zip(grids_of_images, pieces[1:], strict=True)
        )

    def _split_chat(self, messages: Any) -> tuple[list[dict[str, Any]], list[Any]]:
        """Messages whose content is a list of parts without pictures, and their pictures in order."""
        chat, pictures = [], []
        for message in messages:
            content = message.get("content") or ""
            parts = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":  # an empty text before an image would cost it its line
                    parts += [{"type": "text", "text": self.plain(part["text"])}] if part["text"] else []
                elif part["type"] in ("image", "image_url"):
                    parts.append({"type": "image"})
                    source = next((part[name] for name in _IMAGE_SOURCES if part.get(name) is not None), None)
                    source = source.get("url") if isinstance(source, dict) else source
                    pictures += [] if source is None else [source]
                else:
                    raise ValueError(f"content of type {part['type']!r} is not supported, expected 'text' or 'image'")
            chat.append({**message, "content": parts})
        return chat, pictures


def _marked(words: "re.Pattern[str]", text: str) -> str:
    """The text with a mark in each of the words."""
    return words.sub(lambda found: found[0][0] + _AS_TEXT + found[0][1:], text)


def _pictures_of_texts(images: Any, texts: list[str]) -> list[list[Any]]:
    """The pictures of each text, from a nested or a flat list."""
    if images is None:
        return [[] for _ in texts]
    if not isinstance(images, (list, tuple)):
        images = [images]
    nested = [list(entry) for entry in images if isinstance(entry, (list, tuple))]
    if nested:
        if len(nested) != len(images) or len(nested) != len(texts):
            raise ValueError(f"{len(images)} lists of images for {len(texts)} texts: give one list for each text")
        return nested
    counts = [text.count(PLACEHOLDER) for text in texts]
    if not any(counts):
        counts = [1] * len(texts) if len(images) == len(texts) else [len(images)]
    if len(texts) == 1:
        counts = [len(images)]
    if sum(counts) != len(images) or len(counts) != len(texts):
        raise ValueError(f"{len(images)} images for {sum(counts)} {PLACEHOLDER} placeholders in {len(texts)} texts")
    flat = iter(images)
    return [[next(flat) for _ in range(count)] for count in counts]
