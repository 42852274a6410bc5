"""What one rank holds of a run, tensor by tensor, as its layout has split it: for another look, or for a copy."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, nn

from navil_megatron.checkpoint.sharded import optimizer_step, set_optimizer_step, unwrap
from navil_megatron.checkpoint.updated_parameters import updated_parameters
from navil_megatron.config.errors import UserError
from navil_megatron.runtime.seeding import restore_rng_state, rng_state


def held_tensors(chunks: Sequence[nn.Module], optimizer: ChainedOptimizer) -> Iterator[tuple[str, Tensor]]:
    """Every weight and buffer, FP32 copy and moment; two chunks may give the same name."""
    names: dict[Tensor, str] = {}
    for chunk in chunks:
        for name, tensor in unwrap(chunk).state_dict(keep_vars=True).items():
            if not name.endswith("._extra_state"):
                names[tensor] = name
                yield name, tensor
    for part in optimizer.chained_optimizers:
        for parameter, updated in updated_parameters(part):
            if updated is not parameter:
                yield f"FP32 copy of {names[parameter]}", updated
            for kind, moment in part.optimizer.state[updated].items():
                if isinstance(moment, Tensor) and moment.is_floating_point():
                    yield f"{kind} of {names[parameter]}", moment


def copy_rank_state(chunks: Sequence[nn.Module], optimizer: ChainedOptimizer) -> dict[str, Any]:
    """All of it in host memory, with the generators: tensors and plain data."""
    return {
        "tensors": [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in held_tensors(chunks, optimizer)],
        "optimizer_step": optimizer_step(optimizer),
        "generators": rng_state(),
    }


@torch.no_grad()
def restore_rank_state(state: dict[str, Any], chunks: Sequence[nn.Module], optimizer: ChainedOptimizer) -> None:
    """Puts back what ``copy_rank_state`` gave.

    Raises:
        UserError: It is of another model or optimizer.
    """
    held = list(held_tensors(chunks, optimizer))
    forms = [[(name, tensor.shape, tensor.dtype) for name, tensor in side] for side in (held, state["tensors"])]
    if forms[0] != forms[1]:
        here, there = next((pair for pair in zip(*forms, strict=False) if pair[0] != pair[1]), map(len, forms))
        raise UserError(
            f"copy {state.get('name')} does not fit: it has {there} where the run has {here}; remove it from "
            "checkpoint.local_directory on every node"
        )
    for (_, tensor), (_, stored) in zip(held, state["tensors"], strict=True):
        tensor.copy_(stored)
    set_optimizer_step(optimizer, state["optimizer_step"])
    restore_rng_state(state["generators"])
