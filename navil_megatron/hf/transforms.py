"""Pure tensor functions between one parameter as Hugging Face files hold it and as the checkpoint holds it.

Each transform turns the HF tensors of one layer into one tensor and back without arithmetic, so a round trip is
bit-exact. They work on meta tensors too, which is how the table derives the shapes of the HF side.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from navil_megatron.config.model import ModelConfig

type Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Transform:
    """A function from HF tensors to one checkpoint tensor, and its inverse."""

    to_mcore: Callable[[Tensors, ModelConfig], torch.Tensor]
    """The tensors of the row's HF keys, in order -> the tensor of the checkpoint, without the layer axis."""
    to_hf: Callable[[torch.Tensor, ModelConfig], Tensors]
    """The inverse."""


def _single(tensors: Tensors, model: ModelConfig) -> torch.Tensor:
    (tensor,) = tensors
    return tensor


def _unchanged(tensor: torch.Tensor, model: ModelConfig) -> Tensors:
    return (tensor,)


def _flatten_patch(tensors: Tensors, model: ModelConfig) -> torch.Tensor:
    """[w, 3, patch, patch] -> [w, 3 * patch * patch]: a stride-sized convolution is one matrix."""
    (weight,) = tensors
    return weight.flatten(1)


def _unflatten_patch(tensor: torch.Tensor, model: ModelConfig) -> Tensors:
    side = model.vision.patch_size
    return (tensor.reshape(tensor.shape[0], 3, side, side),)


def _interleave_qkv(tensors: Tensors, model: ModelConfig) -> torch.Tensor:
    """[n*d, ...], [g*d, ...] twice -> [(n + 2g)*d, ...], rows of each KV group as q_0 .. q_{n/g-1}, k, v.

    The rest of the shape is [h] for a matrix and nothing for a bias.
    """
    groups = model.language.num_query_groups
    per_group = [tensor.unflatten(0, (groups, tensor.shape[0] // groups)) for tensor in tensors]
    return torch.cat(per_group, dim=1).flatten(0, 1)


def _split_qkv(tensor: torch.Tensor, model: ModelConfig) -> Tensors:
    language = model.language
    groups, channels = language.num_query_groups, language.head_dim
    rows = [language.num_attention_heads // groups * channels, channels, channels]
    per_group = tensor.unflatten(0, (groups, sum(rows)))
    return tuple(part.flatten(0, 1) for part in per_group.split(rows, dim=1))


def _concatenate(tensors: Tensors, model: ModelConfig) -> torch.Tensor:
    """Gate [f, h], up [f, h] -> [2f, h]."""
    return torch.cat(tensors)


def _halve(tensor: torch.Tensor, model: ModelConfig) -> Tensors:
    return tuple(tensor.chunk(2))


def _stack_experts(tensors: Tensors, model: ModelConfig) -> torch.Tensor:
    """k times [h, f] -> [k, h, f]."""
    return torch.stack(tensors)


def _unstack_experts(tensor: torch.Tensor, model: ModelConfig) -> Tensors:
    return tensor.unbind(0)


def _concatenate_experts(tensors: Tensors, model: ModelConfig) -> torch.Tensor:
    """Gate [f, h], up [f, h] of the first expert, of the second, ... -> [k, 2f, h]."""
    return torch.cat(tensors).unflatten(0, (len(tensors) // 2, -1))


def _halve_experts(tensor: torch.Tensor, model: ModelConfig) -> Tensors:
    return tuple(tensor.flatten(0, 1).chunk(2 * tensor.shape[0]))


TRANSFORMS: Mapping[str, Transform] = {
    "same": Transform(_single, _unchanged),
    "patch_convolution": Transform(_flatten_patch, _unflatten_patch),
    "grouped_qkv": Transform(_interleave_qkv, _split_qkv),
    "gate_up": Transform(_concatenate, _halve),
    "experts": Transform(_stack_experts, _unstack_experts),
    "experts_gate_up": Transform(_concatenate_experts, _halve_experts),
}
"""Every transform, under the name that ``param_map`` rows use."""
