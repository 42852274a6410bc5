"""Pure tensor functions between one parameter as Hugging Face files hold it and as the checkpoint holds it.

They move numbers and compute nothing, so a round trip is bit-exact. They work on meta tensors too, from which the
shapes of the Hugging Face side follow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from navil_megatron.config.model import ModelConfig

type Tensors = tuple[torch.Tensor, ...]
type Rearrange = Callable[..., Tensors]
"""``(tensors, model)`` -> tensors of the other side. Pickles."""


@dataclass(frozen=True, slots=True)
class Transform:
    """The tensors of one layer under their Hugging Face keys, in order, <-> the one tensor of the checkpoint."""

    to_mcore: Rearrange
    to_hf: Rearrange


def _unchanged(tensors: Tensors, model: ModelConfig) -> Tensors:
    return tensors


def _flatten_patch(tensors: Tensors, model: ModelConfig) -> Tensors:
    """[w, 3, patch, patch] -> [w, 3 * patch * patch]: a stride-sized convolution is one matrix."""
    return (tensors[0].flatten(1),)


def _unflatten_patch(tensors: Tensors, model: ModelConfig) -> Tensors:
    side = model.vision.patch_size
    return (tensors[0].unflatten(1, (3, side, side)),)


def _interleave_qkv(tensors: Tensors, model: ModelConfig) -> Tensors:
    """[n*d, ...], [g*d, ...] twice -> [(n + 2g)*d, ...], for each KV group q_0 .. q_{n/g-1}, k, v.

    The rest of the shape is [h] for a matrix and nothing for a bias.
    """
    per_group = [tensor.unflatten(0, (model.language.num_query_groups, -1)) for tensor in tensors]
    return (torch.cat(per_group, dim=1).flatten(0, 1),)


def _split_qkv(tensors: Tensors, model: ModelConfig) -> Tensors:
    groups, channels = model.language.num_query_groups, model.language.head_dim
    sizes = [model.language.num_attention_heads // groups * channels, channels, channels]
    per_group = tensors[0].unflatten(0, (groups, sum(sizes)))
    return tuple(tensor.flatten(0, 1) for tensor in per_group.split(sizes, dim=1))


def _concatenate(tensors: Tensors, model: ModelConfig) -> Tensors:
    """Gate [f, h], up [f, h] -> [2f, h]."""
    return (torch.cat(tensors),)


def _halve(tensors: Tensors, model: ModelConfig) -> Tensors:
    return tensors[0].chunk(2)


def _stack(tensors: Tensors, model: ModelConfig) -> Tensors:
    """k times [h, f] -> [k, h, f]."""
    return (torch.stack(tensors),)


def _unstack(tensors: Tensors, model: ModelConfig) -> Tensors:
    return tensors[0].unbind(0)


def _concatenate_and_stack(tensors: Tensors, model: ModelConfig) -> Tensors:
    """Gate [f, h], up [f, h] of the first expert, of the second, ... -> [k, 2f, h]."""
    return (torch.cat(tensors).unflatten(0, (len(tensors) // 2, -1)),)


def _unstack_and_halve(tensors: Tensors, model: ModelConfig) -> Tensors:
    return tensors[0].flatten(0, 1).chunk(2 * len(tensors[0]))


SAME = Transform(_unchanged, _unchanged)
PATCH_CONVOLUTION = Transform(_flatten_patch, _unflatten_patch)
GROUPED_QKV = Transform(_interleave_qkv, _split_qkv)
GATE_UP = Transform(_concatenate, _halve)
EXPERTS = Transform(_stack, _unstack)
EXPERTS_GATE_UP = Transform(_concatenate_and_stack, _unstack_and_halve)
