"""``[model.vision]``: the visual encoder."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from navil_megatron.config.numbers import Count, CountFromZero, NotNegative, Positive, divides


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The visual encoder V_{d,w}: packed images of any size, 2D RoPE, LayerScale (paper, section 3.1)."""

    num_layers: CountFromZero
    """Depth d; 0 leaves only the patch embedding."""
    hidden_size: Count
    """Width w."""
    ffn_hidden_size: Count
    """Width of the GELU feed-forward network."""
    num_attention_heads: Count
    """Attention heads (multi-head, no grouping)."""
    patch_size: Count = 16
    """Side of a square patch, in pixels; the stride of the patch embedding."""
    merge_size: Count = 2
    """Patches merged along each side by the pixel shuffle; one visual token covers patch_size * merge_size pixels."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of the two norms in each layer."""
    norm_epsilon: Positive = 1e-6
    """Epsilon of the norms."""
    qkv_bias: bool = False
    """Bias on the fused query/key/value projection."""
    layer_scale_init: NotNegative = 0.1
    """Initial value of the per-channel LayerScale."""
    rope_theta: Positive = 10_000.0
    """Base of the 2D rotary frequencies; half of them turn with the row, half with the column."""
    token_order: Literal["raster", "window"] = "raster"
    """Order in which visual tokens leave the encoder: ``raster`` as the paper describes, ``window`` as the released
    code does (merge blocks permuted window by window and never put back)."""
    window_size: Count = 8
    """Side of an attention window, in patches; also the unit of the ``window`` token order."""
    full_attention_layers: tuple[int, ...] | None = None
    """Layers that attend over the whole image; the others attend inside windows. ``None``: every layer attends fully.
    Windowed attention needs ``token_order = "window"``."""
    init_std: NotNegative = 0.02
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


def vision_rules(vision: VisionConfig) -> Iterator[str]:
    """One line for every rule that the encoder breaks by itself."""
    heads = ("model.vision.num_attention_heads", vision.num_attention_heads)
    uneven = list(divides(*heads, "model.vision.hidden_size", vision.hidden_size))
    yield from uneven
    if not uneven and vision.head_dim % 4:
        yield (
            f"model.vision: a head has hidden_size / num_attention_heads = {vision.head_dim} channels, expected a "
            "multiple of 4 (2D rotary positions); change one of the two"
        )
    if vision.token_order == "window" and vision.window_size % vision.merge_size:
        yield (
            f"model.vision.window_size = {vision.window_size}: a window holds whole merge blocks, expected a "
            f"multiple of model.vision.merge_size = {vision.merge_size}"
        )
    if vision.full_attention_layers is None:
        return
    if vision.token_order != "window":
        yield (
            f'model.vision.full_attention_layers is set, so the other layers attend inside windows, but token_order = "'
            f'{vision.token_order}"; set model.vision.token_order = "window" or remove full_attention_layers'
        )
    for layer in vision.full_attention_layers:
        if not 0 <= layer < vision.num_layers:
            yield (
                f"model.vision.full_attention_layers names layer {layer}, but model.vision.num_layers = "
                f"{vision.num_layers}; layers count from 0"
            )
