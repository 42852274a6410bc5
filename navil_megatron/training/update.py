"""The two halves of an update, between which somebody decides: the norm of the gradients, then clipping and Adam.

Megatron-core's ``optimizer.step`` is both in one, and refuses an update only where a grad scaler finds infinities,
which bf16 and fp32 do not have.
"""

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer) -> Tensor:
    """Hands the gradients to the optimizer; -> their global norm, [1], still on the device."""
    optimizer.prepare_grads()
    parts = optimizer.chained_optimizers
    if len(parts) == 1 or optimizer.grads_states_parallel_group_is_shared():
        return optimizer.get_grad_norm()
    # Core would have the host read each of these.
    return torch.stack([part.get_grad_norm() for part in parts]).square().sum(0).sqrt()


@torch.no_grad()
def update(optimizer: ChainedOptimizer, norm: Tensor, norm_on_host: float) -> None:
    """Clips by the norm and makes the step. Where nothing is to be clipped no gradient is touched."""
    for part in optimizer.chained_optimizers:
        limit = 0.0 if part.is_stub_optimizer else part.config.clip_grad
        if 0 < limit < norm_on_host + 1e-6 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, limit, norm)
    optimizer.step_with_ready_grads()
