"""The LM head and its cross entropy, a chunk of positions at a time: no more logits than one chunk's ever exist.

Megatron-core's cross entropies take the logits of all positions and keep their softmax in FP32 for the backward pass;
its fused one returns BF16 gradients besides. Here the forward pass keeps two numbers a position, and the backward pass
makes each chunk's logits again. That is one more GEMM of the head, at predicted positions alone; gradients made in the
forward pass would have to know each position's weight there, and would hold the weight's gradient until the backward.
The weight's gradient is added, chunk by chunk, to the FP32 sum that core's DDP keeps of it: no other is made.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, Work

from navil_megatron.blueprint.vocabulary import held_rows, words_of_rank
from navil_megatron.layers.kernels import Kernels


class LossHead(ColumnParallelLinear):
    """megatron-core's vocabulary-parallel LM head, which also gives the cross entropy of its logits.

    A module that is called, not a weight that is read: core waits for gathered parameters when a module is called.
    """

    def __init__(self, input_size: int, vocab_size: int, kernels: Kernels, tp_group: ProcessGroup, **options: Any):
        ranks = tp_group.size()
        super().__init__(input_size, held_rows(vocab_size, ranks) * ranks, tp_group=tp_group, **options)
        self.vocab_size, self.kernels = vocab_size, kernels
        self.num_words = len(words_of_rank(vocab_size, tp_group.rank(), ranks))

    def forward(self, hidden_states: Tensor, weight: Tensor | None, labels: Tensor | None, chunk_tokens: int) -> Tensor:
        """Cross entropies of the labels, or logits where there are none.

        Args:
            hidden_states: [k, h], the same on all tensor-parallel ranks.
            weight: [rows, h] of a tied table, this rank's part with its padding; None: the head's own.
            labels: [k] token ids.
            chunk_tokens: Positions whose logits exist at once.

        Returns:
            [k] float32, or [k, v] on every rank.
        """
        if labels is None:
            return super().forward(hidden_states, weight, runtime_gather_output=True)[0][:, : self.vocab_size]
        head = self.weight if weight is None else weight
        return _LinearCrossEntropy.apply(
            hidden_states, head, self.num_words, labels, chunk_tokens, self.tp_group, self.kernels.add_weight_gradient
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """log(sum(exp(x W^T))) - (x W^T)[label], the rows of W split over a group; those behind its words do not count."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        num_words: int,
        labels: Tensor,
        chunk_tokens: int,
        group: ProcessGroup,
        add_weight_gradient: Callable[[Tensor, Tensor, Tensor], None],
    ) -> Tensor:
        """hidden_states [k, h], weight [rows, h], labels [k] -> [k] float32. Two all-reduces, however many chunks."""
        local = labels - group.rank() * weight.shape[0]
        largest, sums, picked = hidden_states.new_empty(3, labels.shape[0], dtype=torch.float32)
        for rows in _chunks(labels.shape[0], chunk_tokens):
            logits = _logits(hidden_states[rows], weight, num_words)
            torch.amax(logits, dim=1, out=largest[rows])
            picked[rows] = logits.gather(1, _column(local[rows], weight)).squeeze(1)
            torch.sum(logits.sub_(largest[rows, None]).exp_(), dim=1, out=sums[rows])
            del logits  # Before the next chunk's are made, not after.
        picked *= _is_here(local, weight)
        if group.size() > 1:
            largest_here = largest.clone()
            torch.distributed.all_reduce(largest, ReduceOp.MAX, group=group)
            totals = torch.stack([sums * (largest_here - largest).exp_(), picked])
            torch.distributed.all_reduce(totals, group=group)
            sums, picked = totals
        log_sum = largest + sums.log()
        ctx.save_for_backward(hidden_states, weight, local, log_sum)
        ctx.parameter = weight  # what is saved may come back as another tensor, without DDP's marks
        ctx.num_words, ctx.chunk_tokens, ctx.group = num_words, chunk_tokens, group
        ctx.add_weight_gradient = add_weight_gradient
        return log_sum - picked

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and, unless the head is frozen, of its weight.

        Chunks of the weight's gradient are summed in FP32. A chunk of the other is summed over the group while the next
        one is computed.
        """
        hidden_states, weight, local, log_sum = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        total = _gradient_sum(ctx.parameter) if needs_weight else None
        works: list[Work] = []
        for rows in _chunks(local.shape[0], ctx.chunk_tokens):
            grad = _logits(hidden_states[rows], weight, ctx.num_words).sub_(log_sum[rows, None]).exp_()
            here = _is_here(local[rows], weight)
            grad.scatter_add_(1, _column(local[rows], weight), -here.to(grad.dtype).unsqueeze(1))
            grad = grad.mul_(grad_output[rows, None]).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
                if ctx.group.size() > 1:
                    works.append(torch.distributed.all_reduce(grad_hidden[rows], group=ctx.group, async_op=True))
            if total is not None:
                ctx.add_weight_gradient(total, grad, hidden_states[rows])
            del grad
        for work in works:
            work.wait()
        return grad_hidden, None if total is None else _handed_over(total, ctx.parameter), *[None] * 5


def _gradient_sum(weight: Tensor) -> Tensor:
    """[rows, h] float32, to add the weight's gradient to: core's DDP has one, a weight outside of it has not."""
    total: Tensor | None = getattr(weight, "main_grad", None)
    return torch.zeros_like(weight, dtype=torch.float32) if total is None else total


def _handed_over(total: Tensor, weight: Tensor) -> Tensor | None:
    """What autograd is given as the gradient that was added to ``total``: itself, unless core's DDP has it already.

    DDP's hook then runs on a tensor of the weight's shape and type that nobody reads; it gets the sum's own memory
    instead of as much again. Where the weight embeds too (``zero_out_wgrad``), the hook adds what autograd brings: the
    gradient of the embedding, and nothing from here.
    """
    if getattr(weight, "main_grad", None) is not total:
        return total.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(weight, "zero_out_wgrad", False):
        return None
    return total.view(-1).view(weight.dtype)[: weight.numel()].view_as(weight)


def _chunks(num_rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def _logits(hidden_states: Tensor, weight: Tensor, num_words: int) -> Tensor:
    """A chunk's logits in float32, rounded to the weight's type first, as the head itself gives them.

    Behind the words they are the least number: its exponential is 0 beside any logit, also where a rank has no words,
    and unlike that of minus infinity its distance to itself is a number.
    """
    logits = torch.mm(hidden_states, weight.t()).float()
    logits[:, num_words:].fill_(torch.finfo(torch.float32).min)
    return logits


def _is_here(local: Tensor, weight: Tensor) -> Tensor:
    return (local >= 0) & (local < weight.shape[0])


def _column(local: Tensor, weight: Tensor) -> Tensor:
    """The labels' columns here, [rows, 1]; any column for a label that lies elsewhere."""
    return local.clamp(0, weight.shape[0] - 1).unsqueeze(1)
