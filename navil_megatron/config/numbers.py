"""What a number of the config may be: its bound, written at its field, and what must divide it."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

_SUGGESTED_UP_TO = 64  # divisors named in a message stop here: no layout is larger along one axis


class Range(NamedTuple):
    """Where a number may lie."""

    low: float
    """Smallest value, or the limit that ``above`` keeps out."""
    high: float = float("inf")
    """Largest value, or the limit that ``below`` keeps out."""
    above: bool = False
    """``low`` itself is refused."""
    below: bool = False
    """``high`` itself is refused."""

    def holds(self, value: float) -> bool:
        """Whether the value lies in the range; NaN and infinity never do."""
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below or self.high == float("inf") else value <= self.high
        return over and under

    def __str__(self) -> str:
        """As an error message says it: ``at least 1``, ``more than 0 and at most 1``."""
        low = f"{'more than' if self.above else 'at least'} {self.low:,}"
        if self.high == float("inf"):
            return low
        return f"{low} and {'less than' if self.below else 'at most'} {self.high:,}"


# Bounds that many fields have; others are written out, as ``Annotated[float, Range(0, 1)]``.
Count = Annotated[int, Range(1)]
CountFromZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]


def bound_of(annotation: Any) -> Range | None:
    """The range that an annotation carries, be it that of a number, of one that may be off or of each in an array."""
    if get_origin(annotation) is Annotated:
        return next((found for found in annotation.__metadata__ if isinstance(found, Range)), None)
    return next(filter(None, map(bound_of, get_args(annotation))), None)


def out_of_bounds(section: Any, key: str = "") -> Iterator[str]:
    """One line for every number outside its bound in a section with this dotted name, and in those in it; ``None`` is
    off and passes.
    """
    for name, annotation in get_type_hints(type(section), include_extras=True).items():
        value, dotted = getattr(section, name), f"{key}.{name}" if key else name
        bound = bound_of(annotation)
        items = {f"{dotted}[{i}]": item for i, item in enumerate(value)} if type(value) is tuple else {dotted: value}
        for place, item in items.items():
            if is_dataclass(item):
                yield from out_of_bounds(item, place)
            elif bound is not None and item is not None and not bound.holds(item):
                yield f"{place} = {item}: expected {bound}"


def divides(divisor_key: str, divisor: int, key: str, value: int) -> Iterator[str]:
    """One problem if ``divisor`` does not divide ``value``, naming the divisors that would."""
    if value % divisor:
        choices = [str(n) for n in range(1, min(value, _SUGGESTED_UP_TO) + 1) if value % n == 0]
        yield f"{divisor_key} = {divisor} does not divide {key} = {value}; use one of {', '.join(choices)}"
