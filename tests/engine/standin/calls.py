"""What was asked of the stand-in: every call with the shapes of its arguments, to be counted and weighed by tests."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""Every function of the stand-in, by its name in ``transformer_engine_torch``."""


@dataclass(frozen=True)
class Shape:
    """What is kept of a tensor; of a quantized one the shape of its numbers, its class and the bytes that it holds."""

    kind: str
    dims: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int


@dataclass(frozen=True)
class Call:
    """One call of a function, its arguments by name, tensors as shapes."""

    name: str
    arguments: dict[str, Any]
    result: Any

    @property
    def num_bytes(self) -> int:
        """Read and written: those of all tensors among arguments and results, once each time they are named."""
        return sum(shape.num_bytes for shape in _shapes((self.arguments, self.result)))


CALLS: list[Call] = []
"""In their order, since the process started or a test cleared it."""


def count() -> Counter[str]:
    """How often each function was called."""
    return Counter(call.name for call in CALLS)


def exported(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ``transformer_engine_torch``, whose calls are kept."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        arguments = {name: _describe(value) for name, value in bound.arguments.items()}
        result = function(*args, **kwargs)
        CALLS.append(Call(function.__name__, arguments, _describe(result)))
        return result

    FUNCTIONS[function.__name__] = recorded
    return recorded


def _describe(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_describe(part) for part in value)
    if hasattr(value, "get_metadata") and hasattr(value, "dequantize"):  # a quantized tensor, which may be a storage
        held = [part for part in value.get_metadata().values() if isinstance(part, torch.Tensor)]
        return Shape(type(value).__name__, tuple(value.size()), held[0].dtype, sum(part.nbytes for part in held))
    if isinstance(value, torch.Tensor):
        return Shape(type(value).__name__, tuple(value.shape), value.dtype, value.nbytes)
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__


def _shapes(value: Any) -> Iterator[Shape]:
    if isinstance(value, Shape):
        yield value
    elif isinstance(value, tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _shapes(part)
