"""The tensors that a run starts from: taken from a pretrained LLM, or drawn.

Functions of jobs: each takes the sources and gives the targets, needs nothing else, and pickles.
"""

import torch

from navil_megatron.blueprint.parameters import Parameter, initial_seed
from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf.transforms import Tensors, Transform

_ROWS_AT_ONCE = 8192  # rows of a table summed at once


def take(tensors: Tensors, *, transform: Transform, model: ModelConfig, copies: int) -> Tensors:
    """The checkpoint's tensor once for every expert that starts with it."""
    return transform.to_mcore(tensors, model) * copies


def take_table(tensors: Tensors, *, num_rows: int, dtype: torch.dtype) -> Tensors:
    """Embedding table or head [v, h] -> [num_rows, h] of a type; every new row is the mean of the old ones.

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
        return (old,)
    table = torch.empty(num_rows, old.shape[1], dtype=dtype)
    table[: len(old)] = old
    total = sum(rows.double().sum(0) for rows in old.split(_ROWS_AT_ONCE))
    table[len(old) :] = total / len(old)
    return (table,)


def draw(tensors: Tensors, *, parameter: Parameter, layer: int | None, seed: int) -> Tensors:
    """First values by the rule of every new model, from a generator of this layer's own."""
    if parameter.std == 0:
        return (torch.full(parameter.shape, parameter.mean),)
    generator = torch.Generator().manual_seed(initial_seed(seed, f"{parameter.key}:{layer}"))
    return (torch.empty(parameter.shape).normal_(parameter.mean, parameter.std, generator=generator),)


def identity(tensors: Tensors, *, size: int) -> Tensors:
    """[size, size] that leaves its input as it is."""
    return (torch.eye(size),)
