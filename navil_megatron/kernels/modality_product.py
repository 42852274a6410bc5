"""The product of both modalities in plain torch, its collectives overlapped with its products."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work

from navil_megatron.layers.collectives import all_gather_single, reduce_scatter_single


class _ModalityMatmul(torch.autograd.Function):
    """y[:n] = x[:n] W_text^T and y[n:] = x[n:] W_visual^T, with the tensor-parallel collectives of a column layer.

    Where there are biases, b_text and b_visual are added to their rows inside the same GEMM.

    Under sequence parallelism x is this rank's share: it is gathered, not kept, and gathered again in the backward pass
    while the input gradient is computed; that gradient is reduced while the weight gradients are. ``group`` None: no
    collective at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_text: Tensor,
        weight_visual: Tensor,
        bias_text: Tensor | None,
        bias_visual: Tensor | None,
        num_text: int,
        group: ProcessGroup | None,
        sequence_parallel: bool,
    ) -> Tensor:
        """x [t, in] or this rank's share of it, weights [out, in], biases [out] -> [t, out]."""
        ctx.save_for_backward(x, weight_text, weight_visual)
        ctx.num_text, ctx.group, ctx.sequence_parallel = num_text, group, sequence_parallel
        if group is not None and sequence_parallel:
            x, _ = start_gather(x, group, async_op=False)
        return _matmul_by_modality(x, weight_text.t(), weight_visual.t(), num_text, bias_text, bias_visual)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of both weights and of both biases, where they are wanted."""
        x, weight_text, weight_visual = ctx.saved_tensors
        num_text, group = ctx.num_text, ctx.group
        needs_input, needs_text, needs_visual, needs_bias_text, needs_bias_visual = ctx.needs_input_grad[:5]
        grad_output = grad_output.contiguous()
        gathering = None
        if ctx.sequence_parallel and (needs_text or needs_visual):
            x, gathering = start_gather(x, group, async_op=True)
        grad_input, reducing = None, None
        if needs_input:
            grad_input = _matmul_by_modality(grad_output, weight_text, weight_visual, num_text)
            if group is not None:
                grad_input, reducing = start_reduce(grad_input, group, ctx.sequence_parallel)
        if gathering is not None:
            gathering.wait()
        grad_text = grad_output[:num_text].t() @ x[:num_text] if needs_text else None
        grad_visual = grad_output[num_text:].t() @ x[num_text:] if needs_visual else None
        grad_bias_text = grad_output[:num_text].sum(0) if needs_bias_text else None
        grad_bias_visual = grad_output[num_text:].sum(0) if needs_bias_visual else None
        if reducing is not None:
            reducing.wait()
        return grad_input, grad_text, grad_visual, grad_bias_text, grad_bias_visual, None, None, None


def _matmul_by_modality(
    x: Tensor,
    right_text: Tensor,
    right_visual: Tensor,
    num_text: int,
    bias_text: Tensor | None = None,
    bias_visual: Tensor | None = None,
) -> Tensor:
    """[t, in] and two [in, out] -> [t, out], without a copy of either half."""
    output = x.new_empty(x.shape[0], right_text.shape[1])
    for rows, right, bias in (
        (slice(None, num_text), right_text, bias_text),
        (slice(num_text, None), right_visual, bias_visual),
    ):
        if bias is None:
            torch.mm(x[rows], right, out=output[rows])
        else:
            torch.addmm(bias, x[rows], right, out=output[rows])
    return output


def start_gather(x: Tensor, group: ProcessGroup, *, async_op: bool) -> tuple[Tensor, Work | None]:
    """The rows of all ranks, one after the other; complete once the work is waited for."""
    output = x.new_empty(x.shape[0] * group.size(), x.shape[1])
    work = all_gather_single(output, x.contiguous(), group=group, async_op=async_op)
    return output, work


def start_reduce(grad: Tensor, group: ProcessGroup, sequence_parallel: bool) -> tuple[Tensor, Work | None]:
    """The sum over the ranks, under sequence parallelism this rank's share; complete once the work is waited for."""
    if not sequence_parallel:
        return grad, torch.distributed.all_reduce(grad, group=group, async_op=True)
    share = grad.new_empty(grad.shape[0] // group.size(), grad.shape[1])
    return share, reduce_scatter_single(share, grad, group=group, async_op=True)


def modality_product(
    text: nn.Module, visual: nn.Module, rows: Tensor, num_text: int, group: ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """See ``layers.kernels``; both modalities write into one output."""
    output: Tensor = _ModalityMatmul.apply(
        rows, text.weight, visual.weight, text.bias, visual.bias, num_text, group, sequence_parallel
    )
    return output
