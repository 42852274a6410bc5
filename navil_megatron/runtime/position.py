"""Step, microbatch and layer that a rank began last, noted by hooks on its model."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn


class Position:
    """What the training thread began last; the watchdog reads it from another one."""

    def __init__(self) -> None:
        """Before the first step."""
        self.step = 0
        """Step being made, from 1; 0: before the first."""
        self.last = ("", 0, "")
        """Direction, microbatch (from 1 in each step; 0: none yet) and layer by its number in the whole model."""
        self._num_passes: Counter[tuple[int, str]] = Counter()

    def __str__(self) -> str:
        """As it stands in a report; empty: no microbatch began yet."""
        direction, microbatch, layer = self.last
        return f"last began {direction} of microbatch {microbatch}{layer and f', module {layer}'}" if microbatch else ""

    def steps[T](self, rows: Iterator[T], num_done: int) -> Iterator[T]:
        """The same rows, one item a step; a step begins when its rows are asked for."""
        for self.step in count(num_done + 1):
            self.last = ("", 0, "")
            self._num_passes.clear()
            yield next(rows)

    def follow(self, chunks: Sequence[nn.Module]) -> None:
        """Notes the passes of model chunks, as the loop calls them, and of their layers."""
        for number, chunk in enumerate(chunks):
            chunk.register_forward_pre_hook(partial(self._begin_pass, number))
            chunk.register_forward_hook(partial(self._expect_backward, ""))
            for name, module in named_in_whole_model(chunk):
                if re.search(r"layers\.\d+$", name):
                    module.register_forward_pre_hook(partial(self._enter, name))
                    module.register_forward_hook(partial(self._expect_backward, name))

    def _begin_pass(self, number: int, chunk: nn.Module, _arguments: Any) -> None:
        direction = "forward" if chunk.training else "evaluation"
        self._num_passes[number, direction] += 1
        self.last = (direction, self._num_passes[number, direction], "")

    def _enter(self, layer: str, _module: nn.Module, _arguments: Any) -> None:
        self.last = (*self.last[:2], layer)

    def _expect_backward(self, layer: str, _module: nn.Module, _arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(partial(self._begin_backward, ("backward", self.last[1], layer)))

    def _begin_backward(self, last: tuple[str, int, str], _gradient: Tensor) -> None:
        # A stage may give what its last layer gave: one tensor, whose hooks run in the order of the forward pass.
        if last[2] or last[:2] != self.last[:2]:
            self.last = last


def named_in_whole_model(chunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, with layers by their number in the whole model; wrappers' ``module.`` is left out."""
    numbers: dict[str, int] = {}
    for name, module in chunk.named_modules():
        name = re.sub(r"^(?:module\.)+", "", "" if name == "module" else name)
        if (number := getattr(module, "layer_number", None)) and re.search(r"layers\.\d+$", name):
            numbers[name] = number - 1
        layer = re.match(r"(.*?layers)\.\d+", name)
        if layer and layer[0] in numbers:
            name = f"{layer[1]}.{numbers[layer[0]]}{name[layer.end() :]}"
        yield name, module
