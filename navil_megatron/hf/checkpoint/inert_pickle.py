"""A pickle read as data: its plain values, and records where it names a class.

Only opcodes that plain data needs are known, a name must be on the caller's list, and nothing is ever imported, called
or built: what Python's own unpickler would construct becomes a ``Record`` of the name and its arguments. Sizes that a
damaged file states are checked before anything of that size is made.
"""

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

_MARK = object()


class PickleError(ValueError):
    """The bytes are no pickle of plain data."""


@dataclass(slots=True, eq=False)
class Record:
    """What the pickle would have built: by which class or function, of what."""

    name: str
    """``module.name`` of the class or function."""
    arguments: Any = ()
    """What it would have been called with."""
    state: Any = None
    """What would have been set on the result."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class, function or constant that the pickle names, e.g. ``torch.bfloat16``."""

    name: str


@dataclass(slots=True, eq=False)
class Outside:
    """A reference to something kept beside the pickle, e.g. the bytes of a tensor."""

    reference: Any


def read_pickle(content: bytes, allowed: Collection[str]) -> Any:
    """The value that a pickle holds, without its classes.

    Args:
        content: A pickle of protocol 2 to 5.
        allowed: Names (``module.name``) that it may hold.

    Raises:
        PickleError: It holds another name, needs anything but plain data, or is damaged.
    """
    machine = _Machine(content, allowed)
    try:
        return machine.run()
    except (IndexError, TypeError, UnicodeDecodeError, struct.error, OverflowError) as error:
        raise PickleError(f"damaged near byte {machine.position} ({type(error).__name__})") from None


class _Machine:
    """The stack machine that a pickle is a program for, without its dangerous half."""

    def __init__(self, content: bytes, allowed: Collection[str]) -> None:
        self.content = content
        self.position = 0
        self.allowed = allowed
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        if self.content[:1] != b"\x80":
            raise PickleError("not a pickle of protocol 2 or newer")
        content, opcodes = self.content, _OPCODES
        while True:
            code = content[self.position]
            self.position += 1
            if code == ord("."):
                return self.stack.pop()
            step = opcodes.get(code)
            if step is None:
                raise PickleError(f"opcode {code:#x} at byte {self.position - 1} is not for plain data")
            step(self)

    def take(self, count: int) -> bytes:
        start, end = self.position, self.position + count
        if end > len(self.content):
            raise PickleError(f"ends within a value at byte {start}")
        self.position = end
        return self.content[start:end]

    def number(self, layout: str) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def line(self) -> str:
        end = self.content.find(b"\n", self.position)
        if end < 0:
            raise PickleError("ends within a name")
        text = self.take(end - self.position).decode()
        self.position += 1
        return text

    def since_mark(self) -> list[Any]:
        stack = self.stack
        place = len(stack) - 1
        while stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise PickleError("has a list without a start")
        items = stack[place + 1 :]
        del stack[place:]
        return items

    def memoize(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise PickleError(f"refers to value {key}, which it does not hold")
        self.stack.append(self.memo[key])

    def name(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a name that is no text"
        if full not in self.allowed:
            raise PickleError(f"holds {full[:200]!r}, which is not part of such data")
        self.stack.append(Name(full))

    def construct(self) -> None:
        """REDUCE and NEWOBJ: a name and its arguments become a record."""
        arguments, callee = self.stack.pop(), self.stack.pop()
        if not isinstance(callee, Name) or not isinstance(arguments, tuple):
            raise PickleError("builds something that is not a known class")
        self.stack.append(Record(callee.name, arguments))

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise PickleError("sets the state of something that is not a known class")
        self.stack[-1].state = state

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise PickleError("appends to something that is no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("sets items of something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple of shared tuples takes for ever to hash.
            if not isinstance(key, str | int | Record):
                raise PickleError(f"has a {type(key).__name__} as the key of a dictionary")
            target[key] = value

    def tuple_of(self, count: int) -> None:
        stack = self.stack
        if len(stack) < count or _MARK in stack[len(stack) - count :]:
            raise PickleError("has a tuple without its items")
        items = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        stack.append(items)


def _push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.stack.append(read(machine))

    return step


def _integer(length: str) -> Callable[[_Machine], None]:
    return _push(lambda machine: int.from_bytes(machine.take(machine.number(length)), "little", signed=True))


def _text(length: str) -> Callable[[_Machine], None]:
    return _push(lambda machine: machine.take(machine.number(length)).decode("utf-8", "surrogatepass"))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, name)


def _pop_into(method: Callable[[_Machine, list[Any]], None], count: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        items = machine.stack[-count:]
        del machine.stack[-count:]
        method(machine, items)

    return step


_OPCODES: dict[int, Callable[[_Machine], Any]] = {
    ord(code): step
    for code, step in {
        "\x80": lambda m: m.take(1),  # protocol
        "\x95": lambda m: m.take(8),  # frame
        "(": _push(lambda m: _MARK),
        "N": _push(lambda m: None),
        "\x88": _push(lambda m: True),
        "\x89": _push(lambda m: False),
        "K": _push(lambda m: m.number("<B")),
        "M": _push(lambda m: m.number("<H")),
        "J": _push(lambda m: m.number("<i")),
        "\x8a": _integer("<B"),
        "\x8b": _integer("<I"),
        "G": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
        "\x8c": _text("<B"),
        "X": _text("<I"),
        "\x8d": _text("<Q"),
        "]": _push(lambda m: []),
        "}": _push(lambda m: {}),
        ")": _push(lambda m: ()),
        "a": _pop_into(_Machine.extend, 1),
        "e": lambda m: m.extend(m.since_mark()),
        "s": _pop_into(_Machine.update, 2),
        "u": lambda m: m.update(m.since_mark()),
        "t": lambda m: m.stack.append(tuple(m.since_mark())),
        "\x85": lambda m: m.tuple_of(1),
        "\x86": lambda m: m.tuple_of(2),
        "\x87": lambda m: m.tuple_of(3),
        "c": lambda m: m.name(m.line(), m.line()),
        "\x93": _stack_global,
        "R": _Machine.construct,
        "\x81": _Machine.construct,
        "b": _Machine.build,
        "Q": lambda m: m.stack.append(Outside(m.stack.pop())),
        "q": lambda m: m.memoize(m.number("<B")),
        "r": lambda m: m.memoize(m.number("<I")),
        "\x94": lambda m: m.memoize(len(m.memo)),
        "h": lambda m: m.recall(m.number("<B")),
        "j": lambda m: m.recall(m.number("<I")),
    }.items()
}
