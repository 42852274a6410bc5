"""All arithmetic that has more than one implementation: what layers and optimizer ask of a kernel library.

``kernels/`` holds the implementations, each whole: what a library lacks, it takes from torch's by name.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from navil_megatron.blueprint.segments import SegmentGroup


class SegmentAttention(Protocol):
    """Softmax attention inside packed segments."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        groups: tuple[SegmentGroup, ...],
        cu_seqlens: Tensor,
        max_seqlen: int,
        causal: bool,
    ) -> Tensor:
        """Attend; no token at all is legal, and leaves zero gradients.

        Args:
            query: [t, n, d] in attention order.
            key: [t, g, d].
            value: [t, g, d].
            groups: Segments of equal length, adjacent in attention order; they cover all t tokens.
            cu_seqlens: [num_segments + 1] int32 on the device: the same, segment by segment.
            max_seqlen: Tokens of the longest segment.
            causal: Mask later tokens of the segment.

        Returns:
            [t, n * d].
        """
        ...


class FusedHeads(NamedTuple):
    """How query, key and value lie side by side in rows [t, ., ., d] of a fused projection."""

    sizes: tuple[int, int, int]
    """Of query, key and value along ``dim``."""
    dim: int
    """1: [t, 3, n, d]; 2: [t, g, n/g + 2, d]."""

    def shape(self, part: int) -> tuple[int, int]:
        """The two dimensions into which the heads of query, key or value (0, 1, 2) unfold."""
        return (self.sizes[part], -1) if self.dim == 1 else (-1, self.sizes[part])


class HeadNorms(NamedTuple):
    """RMSNorm of each head of query and key."""

    weights: Tensor
    """[2, 2, d] of query and key, of text and visual tokens; [2, 1, d] where those share theirs."""
    is_visual: Tensor | None
    """[t] bool, in attention order; None: shared."""
    epsilon: float


class AttentionHeads(Protocol):
    """The softmax's query, key and value out of a fused projection."""

    def __call__(
        self, qkv: Tensor, fused: FusedHeads, order: Tensor | None, rotary: Tensor, norms: HeadNorms | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Not differentiable; no token at all is legal.

        Args:
            qkv: [t, ., ., d], rows of the projection.
            fused: How they lie there.
            order: [t] int64, the rows in attention order; None: they lie in it.
            rotary: [t, 2, d/2] float32, cosines and sines in attention order (``rope.cos_sin``).
            norms: Applied to query and key before they are turned; None: no norm.

        Returns:
            query [t, n, d], key and value [t, g, d], contiguous.
        """
        ...


class AttentionHeadsGradient(Protocol):
    """The backward pass of ``AttentionHeads``."""

    def __call__(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        qkv: Tensor | None,
        fused: FusedHeads,
        inverse: Tensor | None,
        rotary: Tensor,
        norms: HeadNorms | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of ``qkv`` and of the norms' weights, from those of query, key and value.

        ``inverse`` [t] undoes ``order``; ``qkv`` may be None without norms; the rest is as it was given.
        """
        ...


class ModalityProduct(Protocol):
    """Text tokens through one ``linear`` and visual ones through another, after a column layer's collective."""

    def __call__(
        self,
        rows: Tensor,
        num_text: int,
        group: ProcessGroup | None,
        sequence_parallel: bool,
    ) -> Tensor:
        """Multiply; a modality without tokens leaves zero gradients.

        Args:
            rows: [t, in] in modality-major order, or this rank's share of it under sequence parallelism.
            num_text: Text tokens, of all ranks.
            group: Tensor-parallel ranks that share the input; ``None``: no collective.
            sequence_parallel: The ranks hold shares of the tokens, which are gathered first.

        Returns:
            [t, out].
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One kernel library, set up for a run."""

    norms: Mapping[str, Callable[..., nn.Module]]
    """``rmsnorm`` and ``layernorm`` over the last dimension, built with (size, eps=, dtype=): ``weight`` [size]."""
    attention_heads: AttentionHeads
    attention_heads_gradient: AttentionHeadsGradient
    segment_attention: SegmentAttention
    linear: Callable[..., nn.Module]
    """Built with (input size, output size, bias=, dtype=): ``weight`` [out, in] and, if asked for, ``bias`` [out]."""
    modality_product: Callable[[nn.Module, nn.Module], ModalityProduct]
    """Built once with the ``linear`` of text and that of visual tokens, which hold the weights."""
    swiglu: Callable[[Tensor, Tensor | None], Tensor]
    """[gate | up] [..., 2f] and None or a weight for each row [...]: -> silu(gate) * up [* weight] [..., f]."""
    swiglu_gradient: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    """The gradients of both, from that of the output [..., f], which comes first."""
    grouped_product: Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]
    """Built once with what holds ``weight`` [e, out, in]. Rows [r, in] sorted by expert and [e] int32, one past the
    last row of each: -> [r, out]."""
    add_weight_gradient: Callable[[Tensor, Tensor, Tensor], None]
    """Adds grad_output [r, out]^T rows [r, in] to a sum [out, in] in float32, whatever the type of the two."""
    recompute: Callable[..., Any]
    """Calls a function with its arguments, and again in the backward pass, in the precision that it was called in."""
    encoder_precision: Callable[[], AbstractContextManager[Any]]
    """Entered around each layer of the encoder. The decoder's layers are entered by megatron-core."""
    encoder_rows: int
    """The encoder's patches are padded to a multiple of this."""
    adam: type[torch.optim.Optimizer]
    """AdamW as core builds it, with its step count in the parameter groups from the start."""
