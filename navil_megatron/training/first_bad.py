"""Where in a step the first number appears that is none: hooks on every module, which read, so for a replay alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from navil_megatron.runtime.position import named_in_whole_model


@dataclass(order=True, frozen=True, slots=True)
class Place:
    """A place of a step; sorts by when it comes, first of all the ranks."""

    is_backward: bool
    stage: int
    """In the order of the pass: of the last stage 0 in the backward pass."""
    number: int
    """Modules of this rank that were done before, in this step."""
    rank: int
    module: str
    """With the layer's number in the whole model."""

    def __str__(self) -> str:
        where = "in the gradient that reaches" if self.is_backward else "in what leaves"
        return f"{where} {self.module}"


@contextmanager
def first_bad(chunks: Sequence[nn.Module], rank: int, stage: int, num_stages: int) -> Iterator[list[Place]]:
    """A list that holds, after a step inside, the first place on this rank; empty: every number was one."""
    found: list[Place] = []
    num_done = [0, 0]

    def note(module: str, is_backward: bool, states: Tensor) -> None:
        num_done[is_backward] += 1
        if not (found and (found[0].is_backward <= is_backward)) and not bool(states.isfinite().all()):
            order = num_stages - 1 - stage if is_backward else stage
            found[:] = [Place(is_backward, order, num_done[is_backward], rank, module)]

    def done(module: str, _module: nn.Module, _arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if isinstance(states, Tensor) and states.is_floating_point():
            note(module, False, states)
            if states.requires_grad:
                states.register_hook(partial(note, module, True))

    handles = [
        module.register_forward_hook(partial(done, name))
        for chunk in chunks
        for name, module in named_in_whole_model(chunk)
        if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
