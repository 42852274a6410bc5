"""State that is not finite is never saved: it would push good checkpoints out, and nothing mends it."""

from collections.abc import Sequence

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import nn

from navil_megatron.checkpoint.rank_state import held_tensors
from navil_megatron.config.errors import BadNumbers

_NAMED = 5


@torch.no_grad()
def require_finite(chunks: Sequence[nn.Module], optimizer: ChainedOptimizer, rank: int) -> None:
    """Looks at every weight, FP32 copy and moment that this rank holds; one pass over them, and one read.

    Raises:
        BadNumbers: Some of them are not finite; the message names the first few.
    """
    # The least and the largest number say it, without a copy, and without a sum that might overflow.
    found = [
        (name, torch.stack(torch.aminmax(tensor))) for name, tensor in held_tensors(chunks, optimizer) if tensor.numel()
    ]
    if not found:
        return
    names, ends = zip(*found, strict=True)
    are_finite = torch.stack([pair.float() for pair in ends]).isfinite().all(1).tolist()
    bad = [name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite]
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise BadNumbers(f"state of rank {rank} is not finite ({', '.join(bad[:_NAMED])}{more})")
