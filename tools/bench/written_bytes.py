"""Bytes that operators write, by name: what each costs a GPU that has not fused it, beside a read of as many.

Views write nothing; operators that write in place count what they write.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = ("index_select", "index", "cat", "stack", "copy_", "clone", "_to_copy")
"""Operators that move numbers and compute nothing."""


class _Writes(TorchDispatchMode):
    def __init__(self, written: Counter[str]):
        super().__init__()
        self.written = written

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        output = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            is_new = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given
            if is_new or (isinstance(tensor, Tensor) and operator._schema.is_mutable):
                self.written[operator._schema.name.removeprefix("aten::")] += tensor.nbytes
        return output


@contextmanager
def watching_writes() -> Iterator[Counter[str]]:
    """Operator -> bytes that it writes inside."""
    written: Counter[str] = Counter()
    with _Writes(written):
        yield written


def copied(written: Counter[str]) -> int:
    """Bytes of those that move numbers and compute nothing."""
    return sum(written[name] for name in COPIES)
