"""State that is not finite is never saved: it would push good checkpoints out, and nothing mends it."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, nn

from navil_megatron.checkpoint.updated_parameters import updated_parameters
from navil_megatron.config.errors import BadNumbers

_NAMED = 5


@torch.no_grad()
def require_finite(chunks: Sequence[nn.Module], optimizer: ChainedOptimizer, rank: int) -> None:
    """Looks at every weight, FP32 copy and moment that this rank holds; one pass over them, and one read.

    Raises:
        BadNumbers: Some of them are not finite; the message names the first few.
    """
    # The least and the largest number say it, without a copy, and without a sum that might overflow.
    found = [(name, torch.stack(torch.aminmax(tensor))) for name, tensor in _state(chunks, optimizer) if tensor.numel()]
    if not found:
        return
    names, ends = zip(*found, strict=True)
    are_finite = torch.stack([pair.float() for pair in ends]).isfinite().all(1).tolist()
    bad = [name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite]
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise BadNumbers(f"state of rank {rank} is not finite ({', '.join(bad[:_NAMED])}{more})")


def _state(chunks: Sequence[nn.Module], optimizer: ChainedOptimizer) -> Iterator[tuple[str, Tensor]]:
    names = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            names[parameter] = name.removeprefix("module.")
            yield names[parameter], parameter
    for part in optimizer.chained_optimizers:
        for parameter, updated in updated_parameters(part):
            if updated is not parameter:
                yield f"FP32 copy of {names[parameter]}", updated
            for kind, moment in part.optimizer.state[updated].items():
                if isinstance(moment, Tensor) and moment.is_floating_point():
                    yield f"{kind} of {names[parameter]}", moment
