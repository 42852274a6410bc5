"""Context parallelism: between the projections a rank holds some tokens of a row, inside attention some heads of all.

One all-to-all before the softmax and one after it (DeepSpeed-Ulysses, arXiv 2309.14509). Every rank then runs the same
packed attention as without it, so its load is even however segments are cut, and no segment is padded for it.
"""

from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup


def rows_to_heads(qkv: Tensor, group: ProcessGroup) -> Tensor:
    """All heads of this rank's rows -> this rank's heads of all ranks' rows, one rank's after the other.

    [t/cp, g, n/g + 2, d] -> [t, g/cp, n/g + 2, d]; the number of ranks divides g.
    """
    if group.size() == 1:
        return qkv
    by_rank = qkv.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    return all_to_all(group, by_rank).flatten(0, 1)


def heads_to_rows(context: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's heads of all ranks' rows, [t, n/cp * d] -> all heads of this rank's rows, [t/cp, n * d]."""
    if group.size() == 1:
        return context
    received = all_to_all(group, context.unflatten(0, (group.size(), -1)))
    return received.transpose(0, 1).flatten(1)
