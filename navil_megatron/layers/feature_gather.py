"""Visual features of all ranks of a tensor-parallel group, differentiably."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class GatherFeatures(torch.autograd.Function):
    """[m, h] on each rank -> [ranks * m, h] on every rank.

    Every rank uses the whole result in the same way and so holds the whole gradient of it: the backward pass takes this
    rank's slice and sends nothing. The encoder's weight gradients are then this rank's share of a sum over the group,
    which ``training.step.finalize_gradients`` takes.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, group: ProcessGroup) -> Tensor:
        """Gather along the rows."""
        ctx.group = group
        gathered = features.new_empty(group.size() * features.shape[0], *features.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, features.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """This rank's slice."""
        return grad_output.chunk(ctx.group.size())[ctx.group.rank()], None


def gather_features(features: Tensor, num_rows: int, group: ProcessGroup) -> Tensor:
    """Pad this rank's features to ``num_rows`` and gather all ranks'. [k, h] -> [ranks * num_rows, h].

    The collective runs whatever the microbatch holds, with no rows too, so a rank without an image never keeps the
    others waiting.
    """
    if group.size() == 1:
        return features
    padded = torch.nn.functional.pad(features, (0, 0, 0, num_rows - features.shape[0]))
    return GatherFeatures.apply(padded, group)
