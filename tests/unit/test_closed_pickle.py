"""The closed reader of pickles: plain data and stand-ins, whatever the bytes say; nothing is called, nothing grows."""

import pickle
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from navil_megatron.files.closed_pickle import PickleError, StandIn, read_pickle

ALLOWED = {"torch.Size", "torch.bfloat16", "collections.OrderedDict"}
SIZE = b"ctorch\nSize\n"


def test_plain_values_and_stand_ins() -> None:
    value = {"a": [1, -2, 2**70, 1.5, None, True], "b": ("x", ()), "size": torch.Size((3, 4)), "type": torch.bfloat16}
    for protocol in (2, 4, 5):
        found = read_pickle(pickle.dumps(value | {"order": OrderedDict()}, protocol), ALLOWED)
        assert {key: found[key] for key in ("a", "b")} == {key: value[key] for key in ("a", "b")}
        assert (found["size"].name, found["size"].arguments) == ("torch.Size", ((3, 4),))
        assert found["type"].name == "torch.bfloat16" and issubclass(found["type"], StandIn)
        assert found["order"].name == "collections.OrderedDict"


def _doubled_tuples(depth: int) -> bytes:
    """A tuple of twice the same tuple of twice the same, ..., as the key of a dictionary."""
    doubled = b"".join(b"h%ch%c\x86\x94" % (number, number) for number in range(depth))
    return b"\x80\x04}(K\x01\x85\x94" + doubled + b"K\x01u."


HOSTILE = {
    "another class": pickle.dumps(Path("x")),
    "a function": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "a method of what is allowed": b"\x80\x04\x8c\x05torch\x8c\x0dSize.__init__\x93)R.",
    "an instance of the old kind": b"\x80\x02(iposix\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "state of a class": b"\x80\x02" + SIZE + b"N}X\x01\x00\x00\x00aK\x01s\x86b.",
    "state of a dictionary": b"\x80\x02}N}X\x05\x00\x00\x00itemsK\x01s\x86b.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a new one of a number": b"\x80\x02K\x01)\x81.",
    "a new one of an instance": b"\x80\x02" + SIZE + b")R)\x81.",
    "a huge table": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a huge text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a huge array": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "a key that takes for ever": _doubled_tuples(60),
    "nothing": b"",
    "a piece": pickle.dumps({"a": list(range(1000))})[:-100],
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_anything_else_is_refused_at_once(content: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(PickleError):
        read_pickle(content, ALLOWED)
    assert time.monotonic() - started < 5
