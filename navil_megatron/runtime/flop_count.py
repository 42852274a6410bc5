"""FLOPs of a GPU that is not there, by the formulas of torch's own counter."""

from typing import Any

import torch
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
        flops = formula(*args, **kwargs, out_val=made)
        if "attention" in name or "attn" in name:
            self.attention += flops
        else:
            self.products += flops
