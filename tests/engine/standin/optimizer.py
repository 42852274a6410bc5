"""What optimizers do to lists of tensors in one kernel."""

import torch

from tests.engine.standin.calls import exported


@exported
def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay, /
):
    """Gradients, weights and both moments, and in a fifth list copies of the weights in BF16; mode 1 is AdamW."""
    if mode != 1:
        raise NotImplementedError("Adam with L2 in the gradient")
    if noop_flag.item():
        return
    gradients, weights, *moments = tensor_lists
    copies = moments[2] if len(moments) == 3 else [None] * len(weights)
    if any({x.dtype for x in (first, second)} != {torch.float32} for first, second in zip(*moments[:2], strict=True)):
        raise NotImplementedError("moments in another type than FP32")
    correct1, correct2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, weight, first, second, copy in zip(gradients, weights, *moments[:2], copies, strict=True):
        grad, before = gradient.float(), weight.float()
        first.mul_(beta1).add_(grad, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (first / correct1) / ((second / correct2).sqrt() + epsilon) + weight_decay * before
        weight.copy_(before - lr * update)
        if copy is not None:
            copy.copy_(weight)


@exported
def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor_python, /):
    """The norm of all, [1], and of each, [tensors]."""
    norms = torch.stack([x.float().norm() for x in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor_python else norms.new_empty(0)


@exported
def multi_tensor_unscale_l2norm(chunk_size, noop_flag, tensor_lists, inv_scale, per_tensor_python, /):
    """The same of the tensors times ``inv_scale``."""
    norms = torch.stack([(x.float() * inv_scale).norm() for x in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor_python else norms.new_empty(0)


@exported
def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale, /):
    """The first list times ``scale``, into the second."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source.float() * scale)
        if not target.isfinite().all():
            noop_flag.fill_(1)


@exported
def multi_tensor_scale_tensor(chunk_size, is_infinite, tensor_lists, scale, /):
    """The same by a scale on the device."""
    multi_tensor_scale.__wrapped__(chunk_size, is_infinite, tensor_lists, scale.item())
