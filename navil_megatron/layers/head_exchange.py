"""Context parallelism: between the projections a rank holds some tokens of a row, inside attention some heads of all.

One all-to-all before the softmax and one after it (DeepSpeed-Ulysses, arXiv 2309.14509). Every rank then runs the same
packed attention as without it, so its load is even however segments are cut, and no segment is padded for it.
"""

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup


def rows_to_heads(query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of this rank's rows -> this rank's heads of all ranks' rows, one rank's after the other.

    Args:
        query: [t/cp, n, d], the heads of a key/value head side by side.
        key: [t/cp, g, d].
        value: [t/cp, g, d].
        group: Context-parallel ranks; their number divides g.

    Returns:
        [t, n/cp, d] and twice [t, g/cp, d].
    """
    if group.size() == 1:
        return query, key, value
    heads_per_group = query.shape[1] // key.shape[1]
    per_group = torch.cat([query.unflatten(1, (-1, heads_per_group)), key.unsqueeze(2), value.unsqueeze(2)], dim=2)
    by_rank = per_group.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    received = all_to_all(group, by_rank).flatten(0, 1)
    query, key, value = received.split([heads_per_group, 1, 1], dim=2)
    return query.flatten(1, 2), key.squeeze(2), value.squeeze(2)


def heads_to_rows(context: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's heads of all ranks' rows, [t, n/cp * d] -> all heads of this rank's rows, [t/cp, n * d]."""
    if group.size() == 1:
        return context
    received = all_to_all(group, context.unflatten(0, (group.size(), -1)))
    return received.transpose(0, 1).flatten(1)
