"""How much of their attention an exported model's text tokens give to the image, layer by layer.

The model reads the prompt and its own greedy answer once more, and the softmax of each layer is computed again from the
queries and keys that it hands to ``scaled_dot_product_attention``: the code in the folder stays as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from navil_megatron.config.errors import UserError
from navil_megatron.config.model import SPECIAL_TOKENS
from navil_megatron.hf.generate import Captioner, as_text

CONTEXT = SPECIAL_TOKENS.index("<IMG_CONTEXT>")
_QUERIES_AT_ONCE = 256  # rows of the softmax that exist at once, over all keys and heads


@dataclass(frozen=True)
class ImageAttention:
    """Attention of the text after an image to that image, as means over text tokens and heads."""

    answer: str
    """What the model said; its tokens are text tokens too."""
    num_text_tokens: int
    """Tokens of the prompt after the image, and of the answer."""
    maps: list[list[np.ndarray]]
    """For each layer and scale, small to large, the share that each visual token gets, [rows, columns]."""
    covered: list[tuple[float, float]]
    """For each scale how much of its rows and columns the picture covers; the rest is padding."""

    def share(self, layer: int) -> float:
        """Of all attention of the text, what goes to the image."""
        return sum(float(scale.sum()) for scale in self.maps[layer])


@torch.inference_mode()
def attention_to_image(captioner: Captioner, image: Image.Image, prompt: str, max_new_tokens: int) -> ImageAttention:
    """Looks at one picture.

    Without an ``<image>`` in the prompt the picture comes first. An answer of ``max_new_tokens`` at most is read too.

    Raises:
        UserError: There is no text after the image.
    """
    model, processor = captioner
    inputs = processor(images=[image], text=as_text(processor, prompt)).to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    ids = inputs["input_ids"]
    if max_new_tokens:
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    special = torch.tensor(model.config.special_token_ids, device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device)
    visual = ((ids[0] == special[CONTEXT]) & (places < prompt_length)).nonzero().flatten()
    text = ((places > visual[-1]) & ~torch.isin(ids[0], special)).nonzero().flatten()
    if not len(text):
        raise UserError("no text follows the image: give a --prompt that goes on after <image>, or --max-new-tokens")
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with watching_attention(model, text, visual) as shares:
        model(input_ids=ids, prompt_length=prompt_length, use_cache=False, **images)
    grids = (inputs["image_grid_thw"][:, 1:] // model.merge_size).tolist()
    sizes = [rows * columns for rows, columns in grids]
    maps = [
        [part.view(*grid).numpy() for part, grid in zip(share.cpu().split(sizes), grids, strict=True)]
        for share in shares
    ]
    block = processor.image_processor.patch_size * model.merge_size
    (plan,) = processor.image_processor.plan([(image.height, image.width)])
    covered = [(height / block, width / block) for height, width in plan]
    answer = processor.tokenizer.decode(ids[0, prompt_length:], skip_special_tokens=True)
    return ImageAttention(answer, len(text), maps, covered)


@contextmanager
def watching_attention(model: Any, queries: Tensor, keys: Tensor) -> Iterator[list[Tensor]]:
    """For each decoder layer that runs inside, the mean attention of some tokens to each of others, [keys]."""
    found: list[Tensor] = []
    mode = _Watch(found, queries, keys)
    hooks = []
    for layer in model.language_model.model["layers"]:
        hooks.append(layer.register_forward_pre_hook(lambda *_: setattr(mode, "is_inside", True)))
        hooks.append(layer.register_forward_hook(lambda *_: setattr(mode, "is_inside", False)))
    try:
        with mode:
            yield found
    finally:
        for hook in hooks:
            hook.remove()


class _Watch(TorchFunctionMode):
    """Computes again what ``scaled_dot_product_attention`` weighs its values with, inside a decoder layer."""

    def __init__(self, found: list[Tensor], queries: Tensor, keys: Tensor):
        super().__init__()
        self.found, self.queries, self.keys, self.is_inside = found, queries, keys, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_inside and function is nn.functional.scaled_dot_product_attention:
            self.found.append(mean_attention(args[0][0], args[1][0], self.queries, self.keys))
        return function(*args, **(kwargs or {}))


def mean_attention(query: Tensor, key: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """[b] float32: causal attention of the tokens at ``queries`` to those at ``keys``, a mean over queries and heads.

    ``query`` [n, s, d] and ``key`` [g, s, d] are of one sample, rotated; ``queries`` [a] and ``keys`` [b] are
    positions.
    """
    heads, _, width = query.shape
    key = key.float().repeat_interleave(heads // key.shape[0], dim=0)
    positions = torch.arange(key.shape[1], device=key.device)
    total = torch.zeros(len(keys), device=key.device)
    for some in queries.split(_QUERIES_AT_ONCE):
        scores = query[:, some].float() @ key.transpose(1, 2) * width**-0.5
        weights = scores.masked_fill(positions > some.unsqueeze(1), float("-inf")).softmax(-1)
        total += weights[..., keys].sum((0, 1))
    return total / (heads * len(queries))
