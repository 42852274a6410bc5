"""What every fuzz shares: the count, changed bytes and JSON by seed, and what a reader may do with them."""

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

from navil_megatron.config.errors import UserError, describe
from tests.unit.test_hf_fuzz import SEED, mutate

COUNT = int(os.environ.get("NAVIL_FUZZ", "1000"))
"""Inputs of each kind; ``make fuzz`` asks for more."""
SECONDS_EACH = 20
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31 - 1, 2**32, 2**64, 10**400, 1.5, float("inf"), float("nan")),
    *("", "x", "a/../..", "n" * 5000, "\0", "\ud800", "\x1b[2J\n", [], {}, [[]], {"a": []}),
)


def change_json(value: Any, draw: random.Random) -> Any:
    """The value with one of its leaves or branches replaced, dropped or doubled."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        copy: Any = value.copy()
        key: Any = draw.choice([*copy]) if isinstance(copy, dict) else draw.randrange(len(copy))
        kind = draw.randrange(6)
        if kind == 0:
            del copy[key]
        elif kind == 1 and isinstance(copy, list):
            copy.insert(key, copy[key])
        else:
            copy[key] = change_json(copy[key], draw)
        return copy
    return draw.choice(VALUES)


def damaged_json(value: Any, draw: random.Random) -> bytes:
    """JSON text of a changed value, or changed JSON text."""
    if draw.random() < 0.5:
        content = json.dumps(value).encode()
        return mutate(content, [(0, len(content))], draw)
    return json.dumps(change_json(value, draw)).encode()


def _alarm(*_: Any) -> None:
    raise TimeoutError("hangs")


def fuzz(kind: str, read: Callable[[random.Random], Any], count: int = COUNT) -> Counter[str]:
    """Reads so many inputs, each made by its seed: it works, or ends with a UserError of one readable line."""
    outcomes: Counter[str] = Counter()
    before = signal.signal(signal.SIGALRM, _alarm)
    try:
        for number in range(count):
            seed = f"{SEED} {kind} {number}"
            signal.alarm(SECONDS_EACH)
            try:
                read(random.Random(seed))
                outcomes["works"] += 1
            except UserError as error:
                lines = describe(error).splitlines()
                assert all(line.startswith("error: ") and len(line) < 20_000 for line in lines), f"{seed!r}: {lines}"
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"seed {seed!r}: {type(error).__name__}: {error}"[:2000]) from error
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    return outcomes
