"""What megatron-core's optimizer of a rank updates for each parameter of the model."""

from collections.abc import Iterable
from itertools import chain

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import nn


def updated_parameters(optimizer: MegatronOptimizer) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
    """Each parameter of the model that this rank updates, and what it updates for it, which has the gradient: the
    parameter itself, its FP32 copy, or this rank's slice of either.
    """
    if optimizer.is_stub_optimizer:
        return []
    if isinstance(optimizer, DistributedOptimizer):
        models = (*optimizer.model_float16_groups, *optimizer.model_fp32_groups)
        updated = (*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        models = (*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups)
        updated = (*optimizer.fp32_from_float16_groups, *optimizer.fp32_from_fp32_groups)
    else:
        models = updated = (optimizer.get_parameters(),)
    return zip(chain(*models), chain(*updated), strict=True)
