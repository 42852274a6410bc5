"""Communication of the distributed optimizer under the computation of the step: what core's schedules and DDP need.

Gradients of a bucket are summed as soon as the last microbatch's backward pass has made them all. Updated weights are
gathered bucket by bucket when the next forward pass calls a module that holds them, so whoever reads weights between a
step and the next forward pass asks for them first (``gather_parameters``).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config
from torch import nn


def set_schedule_hooks(chunks: Sequence[DistributedDataParallel]) -> None:
    """Tells core's schedules when to start the sum of gradients: after the last microbatch, never before.

    The interleaved schedule takes one function for each chunk, the others one function. As in core's own training loop,
    stages after the first start theirs at the end of their backward passes, in the bubble that they wait in anyway;
    each stage gathers weights when it comes to them, so core is given no ``param_sync_func`` and needs no alignment.
    """
    if not chunks[0].ddp_config.overlap_grad_reduce:
        return
    config = get_model_config(chunks[0])
    no_sync = [chunk.no_sync for chunk in chunks]
    grad_sync = [chunk.start_grad_sync for chunk in chunks]
    config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    config.grad_sync_func = grad_sync if len(chunks) > 1 else grad_sync[0]


def wait_for_held_weights(chunk: DistributedDataParallel) -> None:
    """Makes a module wait for the weights that it reads without a call of the child that holds them.

    Core waits for the gathered weights of a module when it is called. One text and one visual matrix, of which their
    parent makes one product, would be read before they arrived. Other children are left to their own calls: who waits
    early, waits for weights that are still needed elsewhere first.
    """
    if not chunk.ddp_config.overlap_param_gather:
        return
    wait = chunk._make_forward_pre_hook()
    for module in chunk.module.modules():
        if getattr(module, "reads_weights_of_children", False):
            for child in module.children():
                module.register_forward_pre_hook(partial(_wait_for, wait, child))


def gather_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Puts the updated weights in place on every rank, now. A collective; free where they are in place already."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                if not group.param_gather_dispatched or group.param_gather_handle is not None:
                    group.start_param_sync(force_sync=True)


def _wait_for(wait: Any, child: nn.Module, module: nn.Module, arguments: Any) -> None:
    wait(child)
