"""Depth, width and heads of an encoder, by the paper's findings.

An encoder of depth d and width w has 12 d w^2 parameters (section 3.2.3). At 600M, depths 12 and 24 end equal in loss
and 24 captions best; 3 and 48 are worse (observation 3). So the shape follows the two released ones, 24 x 1472 and
32 x 1792, whose heads have size 64 (table 6).
"""

import math
from dataclasses import dataclass

HEAD_SIZE = 64
SMALLEST_WIDTH = 768  # a patch of 16 x 16 pixels has so many channels; the paper wants no less width
_RELEASED = ((24, 1472), (32, 1792))
SOURCE = (
    "12 d w^2 parameters; depth on the log-log line through the paper's 24 x 1472 and 32 x 1792, even; width a "
    "multiple of its head size 64. At 600M the paper finds depths 12 to 24 equal in loss, 3 and 48 worse, and with "
    "less than 30M samples shallower ones ahead"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of an encoder."""

    depth: int
    width: int

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // HEAD_SIZE

    @property
    def parameters(self) -> int:
        """By the paper's count, 12 d w^2."""
        return 12 * self.depth * self.width**2


def choose_shape(parameters: float) -> tuple[Shape, list[str]]:
    """The shape nearest to so many parameters, and what to warn of."""
    small, large = (Shape(*sizes) for sizes in _RELEASED)
    slope = math.log(large.depth / small.depth) / math.log(large.parameters / small.parameters)
    depth = max(1, 2 * round(small.depth * (parameters / small.parameters) ** slope / 2))
    shape = Shape(depth, HEAD_SIZE * max(1, round(math.sqrt(parameters / (12 * depth)) / HEAD_SIZE)))
    warnings = []
    if shape.width < SMALLEST_WIDTH:
        warnings.append(
            f"width {shape.width} is below the {SMALLEST_WIDTH} channels of a 16 x 16 patch, which the paper wants at "
            "least; it studied no encoder this small"
        )
    if abs(math.log(shape.parameters / parameters)) > math.log(1.1):
        warnings.append(f"the shape has {shape.parameters:,} parameters: heads of size {HEAD_SIZE} come no nearer")
    return shape, warnings
