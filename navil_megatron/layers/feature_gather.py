"""Visual features of all ranks that share a row, differentiably."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from navil_megatron.layers.collectives import all_gather_single, reduce_scatter_single


class GatherFeatures(torch.autograd.Function):
    """[m, h] on each rank -> [ranks * m, h] on every rank.

    Tensor-parallel ranks use the whole result in the same way and so hold the whole gradient of it: the backward pass
    takes this rank's slice and sends nothing. Context-parallel ranks use different rows of it, so among them slices are
    summed. The encoder's weight gradients are then this rank's share of a sum over the group, which
    ``training.step.finalize_gradients`` takes.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, group: ProcessGroup, cp_group: ProcessGroup) -> Tensor:
        """Gather along the rows."""
        ctx.group, ctx.cp_group = group, cp_group
        gathered = features.new_empty(group.size() * features.shape[0], *features.shape[1:])
        all_gather_single(gathered, features.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """This rank's slice, summed over the context-parallel ranks."""
        ranks, cp_size = ctx.group.size(), ctx.cp_group.size()
        slices = grad_output.reshape(cp_size, ranks // cp_size, grad_output.shape[0] // ranks, grad_output.shape[1])
        # Tensor-parallel ranks count fastest in the group.
        mine = slices[:, ctx.group.rank() % slices.shape[1]]
        if cp_size == 1:
            return mine[0], None, None
        summed = torch.empty_like(mine[0])
        reduce_scatter_single(summed, mine.flatten(0, 1), group=ctx.cp_group)
        return summed, None, None


def gather_features(features: Tensor, num_rows: int, group: ProcessGroup, cp_group: ProcessGroup) -> Tensor:
    """Pad this rank's features to the largest share of a rank and gather all. [k, h] -> [ranks * num_rows, h].

    ``group`` holds the ranks that share a row: tensor-parallel ones, times context-parallel ones. The collective runs
    whatever the microbatch holds, with no rows too, so a rank without an image never keeps the others waiting.
    """
    if group.size() == 1:
        return features
    padded = torch.nn.functional.pad(features, (0, 0, 0, num_rows - features.shape[0]))
    return GatherFeatures.apply(padded, group, cp_group)
