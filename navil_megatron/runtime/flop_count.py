"""FLOPs of a GPU that is not there, by the formulas of torch's own counter."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry


class FlopCount:
    """Observer of a ``FakeGPU``: products with weights, and those of attention."""

    def __init__(self) -> None:
        self.products = self.attention = 0

    def __call__(self, func: Any, args: tuple, kwargs: dict[str, Any], made: Any) -> None:
        """Adds one operation."""
        name = func._opname.removesuffix("_")  # in place or not
        formula = flop_registry.get(func._overloadpacket) or flop_registry.get(getattr(torch.ops.aten, name, None))
        if formula is None:
            return
        # Of segments of unknown length, which a fake tensor gives, torch would take each for the longest.
        args = tree_map(lambda leaf: getattr(leaf, "known", leaf), args)
        with unset_fake_temporarily():
            flops = formula(*args, **kwargs, out_val=made)
        if "attention" in name or "attn" in name:
            self.attention += flops
        else:
            self.products += flops
