"""The tensors that a run starts from: taken from a pretrained LLM, or drawn.

Functions of ``plan.Step``s: each takes the sources and gives the targets, needs nothing else, and pickles.
"""

import hashlib

import torch

from navil_megatron.blueprint.parameters import Parameter
from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf.transforms import TRANSFORMS, Tensors

_ROWS_AT_ONCE = 8192
"""Rows of a table summed at once."""


def take(tensors: Tensors, *, transform: str, model: ModelConfig, dtype: torch.dtype, copies: int) -> Tensors:
    """The checkpoint's tensor once for every expert that starts with it."""
    taken = TRANSFORMS[transform].to_mcore(tensors, model).to(dtype)
    return (taken,) * copies


def take_table(tensors: Tensors, *, num_rows: int, dtype: torch.dtype) -> Tensors:
    """Embedding table or head [v, h] -> [num_rows, h]; every new row is the mean of the old ones.

    A second source is the head that the LLM's folder holds beside the table it is tied to.

    Raises:
        UserError: The head differs from the table.
    """
    old = tensors[0]
    if any(not torch.equal(old, head) for head in tensors[1:]):
        raise UserError(
            "the LLM's config.json says tie_word_embeddings, but its folder holds an LM head that differs from the "
            "embedding table; set tie_word_embeddings to false there, or remove the head from the files"
        )
    if num_rows == len(old):
        return (old.to(dtype),)
    table = torch.empty(num_rows, old.shape[1], dtype=dtype)
    table[: len(old)] = old
    total = sum(part.double().sum(0) for part in old.split(_ROWS_AT_ONCE))
    table[len(old) :] = total / len(old)
    return (table,)


def draw(
    tensors: Tensors,
    *,
    parameter: Parameter,
    layer: int | None,
    seed: int,
    dtype: torch.dtype,
) -> Tensors:
    """First values by the rule of every new model, from a generator of this layer's own."""
    if parameter.std == 0:
        return (torch.full(parameter.shape, parameter.mean, dtype=dtype),)
    digest = hashlib.sha256(f"{seed}:{parameter.key}:{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(parameter.shape).normal_(parameter.mean, parameter.std, generator=generator)
    return (values.to(dtype),)


def identity(tensors: Tensors, *, size: int, dtype: torch.dtype) -> Tensors:
    """[size, size] that leaves its input as it is."""
    return (torch.eye(size, dtype=dtype),)
