"""``[model.vision]``: the visual encoder."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The visual encoder V_{d,w}: packed images of any size, 2D RoPE, LayerScale (paper, section 3.1)."""

    num_layers: int
    """Depth d; 0 leaves only the patch embedding."""
    hidden_size: int
    """Width w."""
    ffn_hidden_size: int
    """Width of the GELU feed-forward network."""
    num_attention_heads: int
    """Attention heads (multi-head, no grouping)."""
    patch_size: int = 16
    """Side of a square patch, in pixels; the stride of the patch embedding."""
    merge_size: int = 2
    """Patches merged along each side by the pixel shuffle; one visual token covers patch_size * merge_size pixels."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of the two norms in each layer."""
    norm_epsilon: float = 1e-6
    """Epsilon of the norms."""
    qkv_bias: bool = False
    """Bias on the fused query/key/value projection."""
    layer_scale_init: float = 0.1
    """Initial value of the per-channel LayerScale."""
    rope_theta: float = 10_000.0
    """Base of the 2D rotary frequencies; half of them turn with the row, half with the column."""
    token_order: Literal["raster", "window"] = "raster"
    """Order in which visual tokens leave the encoder: ``raster`` as the paper describes, ``window`` as the released
    code does (merge blocks permuted window by window and never put back)."""
    window_size: int = 8
    """Side of an attention window, in patches; also the unit of the ``window`` token order."""
    full_attention_layers: tuple[int, ...] | None = None
    """Layers that attend over the whole image; the others attend inside windows. ``None``: every layer attends fully.
    Windowed attention needs ``token_order = "window"``."""
    init_std: float = 0.02
    """Standard deviation of randomly initialised matrices."""

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened RGB patch."""
        return 3 * self.patch_size * self.patch_size

    @property
    def merged_size(self) -> int:
        """Width of one pixel-shuffled token, the connector's input."""
        return self.hidden_size * self.merge_size**2
