"""From config to megatron-core's optimizer: AdamW with FP32 master weights, split over the data-parallel ranks.

A pipeline stage, or a whole model, with nothing to train is legal: its optimizer steps, joins the gradient norm and is
saved like any other.
"""

import megatron.core.optimizer as core_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, distrib_optimizer, get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config

from navil_megatron.config.run import NaViLConfig
from navil_megatron.kernels.provider import choose_kernels
from navil_megatron.runtime.session import Session
from navil_megatron.training.clipping import clip_on_device
from navil_megatron.training.overlap import set_schedule_hooks, wait_for_held_weights


def wrap_ddp(
    config: NaViLConfig, session: Session, chunks: list[MegatronModule], bucket_size: int | None = None
) -> list[DistributedDataParallel]:
    """The model chunks with FP32 gradient buffers that are summed over the data-parallel ranks.

    ``bucket_size``: parameters whose communication overlaps as one; None: as core chooses by the number of ranks.
    """
    ours = config.optimizer
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=ours.overlap_grad_reduce,
        overlap_param_gather=ours.overlap_param_gather,
        use_distributed_optimizer=ours.distributed,
        bucket_size=bucket_size,
    )
    wrapped = [
        DistributedDataParallel(
            get_model_config(chunk), ddp_config, chunk, disable_bucketing=index > 0, pg_collection=session.groups
        )
        for index, chunk in enumerate(chunks)
    ]
    set_schedule_hooks(wrapped)
    for chunk in wrapped:
        wait_for_held_weights(chunk)
    return wrapped


def build_optimizer(config: NaViLConfig, chunks: list[DistributedDataParallel], session: Session) -> ChainedOptimizer:
    """The optimizer of this rank's chunks; Adam's moments exist from the start, so it can be saved before a step.

    Load initial weights before this: the master weights are copied here.
    """
    _use_adam(choose_kernels(config).adam)
    if config.runtime.kernels == "torch":
        clip_on_device()
    optimizer = get_megatron_optimizer(
        _core_config(config), chunks, use_gloo_process_groups=False, pg_collection=session.groups
    )
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            part.init_state_fn(part.optimizer, part.config)
    for part in optimizer.chained_optimizers[:-1]:
        # Core keeps one optimizer for shared weights and one for experts, and each gathers all updated weights: once,
        # after the last update, is enough.
        part._defer_param_sync = True
    for group in optimizer.param_groups:
        # Core leaves this product to its own scheduler, which we do not use.
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, learning_rate: float) -> None:
    """The rate of the next update, for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _core_config(config: NaViLConfig) -> core_optimizer.OptimizerConfig:
    ours = config.optimizer
    is_bf16 = config.precision.type == "bf16"
    return core_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=ours.lr,
        min_lr=ours.min_lr,
        weight_decay=ours.weight_decay,
        adam_beta1=ours.beta1,
        adam_beta2=ours.beta2,
        adam_eps=ours.epsilon,
        decoupled_weight_decay=True,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        clip_grad=ours.clip_grad or 0.0,
        use_distributed_optimizer=ours.distributed,
        overlap_param_gather=ours.overlap_param_gather,
    )


def _use_adam(adam: type[torch.optim.Optimizer]) -> None:
    """Makes core take this Adam, on every machine, and treat it like a fused one: step in the parameter groups.

    Core decides at import by what is installed (optimizer/__init__.py, distrib_optimizer.py): Transformer Engine's or
    Apex's Adam if they are there, torch's otherwise, whose state it cannot restore rightly.
    """
    core_optimizer.Adam = adam
    core_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = adam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
