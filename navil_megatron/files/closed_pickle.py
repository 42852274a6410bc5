"""A pickle read as data: its plain values, and stand-ins where it names classes. Nothing is imported, called or built.

Python's own machine runs it, with the opcodes that plain data needs and the names that the caller lists. It is the one
that is written in Python: the one in C makes a table as long as the largest index that a damaged file states.
"""

import io
import pickle
import struct
from collections.abc import Callable, Collection
from functools import cache
from typing import Any, ClassVar

_OPCODES = b"\x80\x95(N\x88\x89KMJ\x8a\x8bG\x8cX\x8d]})aesut\x85\x86\x87c\x93R\x81bQqr\x94hj."
_DAMAGE = (
    *(pickle.UnpicklingError, struct.error, EOFError, LookupError, TypeError, ValueError),
    *(AttributeError, AssertionError, OverflowError),
)


class PickleError(ValueError):
    """The bytes are no pickle of plain data."""


class StandIn:
    """What the pickle would have built. What it names without building anything of it stays a subclass of this."""

    name: ClassVar[str]
    """``module.name`` of the class, function or constant."""
    arguments: tuple[Any, ...]
    """What it would have been called with."""
    state: Any
    """What would have been set on the result."""

    def __new__(cls, *arguments: Any) -> "StandIn":
        """Keeps what the constructor would have been given."""
        built = super().__new__(cls)
        built.arguments, built.state = arguments, None
        return built

    def __setstate__(self, state: Any) -> None:
        """Keeps what would have been set."""
        self.state = state


def read_pickle(content: bytes, allowed: Collection[str]) -> Any:
    """The value that a pickle of protocol 2 to 5 holds; ``allowed`` are the names (``module.name``) that it may hold.

    Raises:
        PickleError: It holds another name, needs anything but plain data, or is damaged.
    """
    machine = _Machine(content, allowed)
    try:
        value = machine.load()
    except PickleError:
        raise
    except _DAMAGE as error:
        raise PickleError(f"is damaged, or no pickle of plain data ({type(error).__name__})") from None
    if max(machine.memo, default=0) > len(content):  # type: ignore[attr-defined]  # typeshed does not know it
        raise PickleError("counts more values than it has bytes")
    return value


class _Machine(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        opcode: pickle._Unpickler.dispatch[opcode] for opcode in _OPCODES
    }

    def __init__(self, content: bytes, allowed: Collection[str]) -> None:
        super().__init__(io.BytesIO(content))
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> type[StandIn]:
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise PickleError(f"holds {full[:200]!r}, which is not part of such data")
        return _stand_in(full)

    def persistent_load(self, reference: Any) -> Any:
        """Reference to something kept beside the pickle, as it stands, e.g. to the numbers of a tensor."""
        return reference

    def load_empty_dictionary(self) -> None:
        self.append(_Dictionary())  # type: ignore[attr-defined]

    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dictionary


class _Dictionary(dict[Any, Any]):
    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        # A tuple of shared tuples takes for ever to hash.
        if not isinstance(key, str | int | StandIn):
            raise PickleError(f"has a {type(key).__name__} as the key of a dictionary")
        super().__setitem__(key, value)


@cache
def _stand_in(name: str) -> type[StandIn]:
    return type(name, (StandIn,), {"name": name})
