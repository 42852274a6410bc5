"""Transformer Engine (2.20): linears, norms, packed attention, fused Adam, and the encoder's FP8.

Parameters have the names, shapes and types of ``torch_kernels``, and nothing else is saved: a checkpoint of either
loads into the other. Without ``_extra_state`` the scales of delayed FP8 start with 1 on resume, as in a new run.

Imported by ``provider.choose_kernels`` alone, once ``te_install`` has found that it can be.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, Recipe
from transformer_engine.pytorch.distributed import get_activation_recompute_contexts
from transformer_engine.pytorch.optimizers import FusedAdam
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from navil_megatron.config.precision import FP8_ROWS
from navil_megatron.config.run import NaViLConfig
from navil_megatron.kernels import torch_kernels
from navil_megatron.kernels.te_product import GroupedProduct, QuantizedOnce, StackProduct, WeightsAlone
from navil_megatron.layers.kernels import Kernels

ENCODER_RECIPES: Mapping[str, type[Recipe]] = {"tensorwise": Float8CurrentScaling, "blockwise": Float8BlockScaling}
"""``precision.fp8`` -> the recipe for the encoder. The decoder's are chosen by megatron-core, by the same names."""


def build_kernels(config: NaViLConfig) -> Kernels:
    """The kernels of a run, with its FP8 recipe and its fusion of gradient sums."""
    precision = config.precision
    fused_sums = config.runtime.gradient_accumulation_fusion == "transformer_engine"
    encoder_precision, encoder_rows = nullcontext, 1
    if precision.fp8_encoder:
        encoder_precision = partial(te.autocast, enabled=True, recipe=ENCODER_RECIPES[precision.fp8]())  # type: ignore[assignment]
        encoder_rows = FP8_ROWS[precision.fp8]
    return Kernels(
        norms={"rmsnorm": partial(build_norm, RMSNorm), "layernorm": partial(build_norm, LayerNorm)},
        attention_heads=torch_kernels.attention_heads,
        attention_heads_gradient=torch_kernels.attention_heads_gradient,
        segment_attention=segment_attention,
        linear=partial(build_linear, fuse_wgrad_accumulation=fused_sums),
        grouped_product=(
            torch_kernels.TORCH_KERNELS.grouped_product
            if precision.fp8 == "none"
            else partial(StackProduct, row_multiple=FP8_ROWS[precision.fp8])
        ),
        add_weight_gradient=torch_kernels.add_weight_gradient,
        modality_product=partial(ModalityProduct, fuse_wgrad_accumulation=fused_sums),
        swiglu=torch_kernels.swiglu,
        swiglu_gradient=torch_kernels.swiglu_gradient,
        adam=Adam,
        recompute=recompute,
        encoder_precision=encoder_precision,
        encoder_rows=encoder_rows,
    )


class Linear(QuantizedOnce, te.Linear):
    """[..., in] -> [..., out] in the precision of the context that it runs in; no rows at all are legal."""

    def forward(self, rows: Tensor) -> Tensor:
        """Multiply."""
        output: Tensor = super().forward(rows, is_first_microbatch=self.is_first_microbatch)
        if self.is_first_microbatch:
            self.is_first_microbatch = False
        return output


class RMSNorm(WeightsAlone, te.RMSNorm):
    """RMSNorm over the last dimension."""

    def forward(self, rows: Tensor) -> Tensor:
        """[..., h] -> [..., h]; of no rows, which the engine refuses, the gradient of the weight is zero."""
        normed: Tensor = super().forward(rows) if rows.numel() else rows * self.weight
        return normed


class LayerNorm(WeightsAlone, te.LayerNorm):
    """LayerNorm over the last dimension."""

    def forward(self, rows: Tensor) -> Tensor:
        """As of ``RMSNorm``."""
        normed: Tensor = super().forward(rows) if rows.numel() else rows * self.weight + self.bias
        return normed


def build_linear(
    input_size: int, output_size: int, bias: bool = True, dtype: torch.dtype | None = None, **options: Any
) -> nn.Module:
    """A linear without collectives: those are the layers', once for both modalities."""
    # By name: Transformer Engine compares it with "meta".
    device = str(torch.get_default_device())
    linear = Linear(input_size, output_size, bias=bias, params_dtype=dtype, device=device, **options)
    for parameter in linear.parameters():
        # Transformer Engine marks every weight as split over tensor-parallel ranks; the layers say which is.
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(parameter, name):
                delattr(parameter, name)
    return linear


def build_norm(kind: type[nn.Module], size: int, eps: float, dtype: torch.dtype) -> nn.Module:
    """A norm."""
    return kind(size, eps=eps, dtype=dtype, device=torch.get_default_device())


class ModalityProduct(GroupedProduct):
    """See ``layers.kernels``."""

    def __init__(self, text: nn.Module, visual: nn.Module, fuse_wgrad_accumulation: bool):
        super().__init__((text, visual), fuse_wgrad_accumulation)

    def forward(self, rows: Tensor, num_text: int, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:  # type: ignore[override]
        """See ``layers.kernels``."""
        ranks = group.size() if group is not None and sequence_parallel else 1
        sizes = (num_text, len(rows) * ranks - num_text)
        return super().forward(rows, sizes, group, sequence_parallel)


@cache
def _attention(num_heads: int, head_dim: int, num_groups: int) -> nn.Module:
    """It has no weights, so all layers of one shape share it."""
    attention: nn.Module = te.DotProductAttention(
        num_heads, head_dim, num_groups, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding"
    )
    return attention


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, *, groups: Any, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> Tensor:
    """See ``layers.kernels``: one ``thd`` kernel, in BF16 under every recipe. A kernel that is set up for one longest
    segment is set up again for another, so that there are few of them.
    """
    if query.shape[0] == 0:
        return torch_kernels.segment_attention(
            query, key, value, groups=groups, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, causal=causal
        )
    longest = 1 << (max_seqlen - 1).bit_length()
    attention = _attention(query.shape[1], query.shape[2], key.shape[1])
    with te.autocast(enabled=False):
        context: Tensor = attention(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            attn_mask_type="padding_causal" if causal else "padding",
            window_size=(-1, 0 if causal else -1),
        )
    return context


def recompute(function: Callable[..., Any], *arguments: Any) -> Any:
    """See ``layers.kernels``. Delayed scaling takes the scales of the first run again and learns nothing of it twice.

    The engine's own ``checkpoint`` enters the recipe anew, which updates all scales once for each recomputed layer.
    """
    state = FP8GlobalStateManager.get_autocast_state()
    first, second = get_activation_recompute_contexts()
    # Every module takes the scales that it left, so none may be left out of the second run.
    with set_checkpoint_early_stop(False):
        return checkpoint(
            function,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (first, _again(second, state)),
        )


@contextmanager
def _again(phase: AbstractContextManager[Any], state: tuple[Any, ...]) -> Iterator[None]:
    """The second run, inside the recipe without entering it."""
    outside = FP8GlobalStateManager.get_autocast_state()
    with phase:
        FP8GlobalStateManager.set_autocast_state(state)
        try:
            yield
        finally:
            FP8GlobalStateManager.set_autocast_state(outside)


class Adam(FusedAdam):
    """Transformer Engine's fused AdamW with the step count in every parameter group from the start, as our own."""

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        for group in self.param_groups:
            group.setdefault("step", 0)
