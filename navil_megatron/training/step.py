"""One step: megatron-core's schedule, the gradient sums, a look at the numbers, the update, and what it cost.

The loss is a weighted sum over the global batch divided by its weight, at every layout. The weight is known on the host
of every rank before the step, since every rank holds the microbatches' labels.

Before the update the host reads one small tensor, the same on every rank: loss and gradient norm. So all ranks make an
update or none does, and a bad number never reaches a weight. It is the only time in a step that the host waits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loss_groups import num_loss_groups
from navil_megatron.data.types import Microbatch
from navil_megatron.models.inputs import ModelInputs
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import upload_ahead
from navil_megatron.training.optimizer import set_learning_rate
from navil_megatron.training.update import gradient_norm, update

type Chunks = list[DistributedDataParallel]
type LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
type Judge = Callable[[float, float], str]
"""Loss and gradient norm -> why the update is refused, or nothing."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured. Tensors are still on the device; read them only when they are logged."""

    microbatch_loss_sums: Tensor
    """Weighted sums of cross entropies of this rank's microbatches, [microbatches]; 0 except on the last stage."""
    group_loss_sums: Tensor
    """Their sum apart for each group of ``data.loss_groups``, [groups]."""
    loss_weight: Tensor
    """Weight of the global batch."""
    loss: float = math.nan
    """Of the global batch; like what follows, only of a training step."""
    grad_norm: float = math.nan
    """Global gradient norm before clipping."""
    bad_ranks: tuple[int, ...] = ()
    """Ranks whose own part of the loss is not finite."""
    refused: str = ""
    """Why no update was made."""

    @property
    def loss_sum(self) -> Tensor:
        """Of this rank's microbatches together."""
        return self.microbatch_loss_sums.sum()


def not_finite(loss: float, grad_norm: float) -> str:
    """What every update is refused for."""
    bad = [name for name, number in (("loss", loss), ("gradient norm", grad_norm)) if not math.isfinite(number)]
    return f"{' and '.join(bad)} not finite" if bad else ""


def train_step(
    config: NaViLConfig,
    session: Session,
    chunks: Chunks,
    optimizer: ChainedOptimizer,
    microbatches: Sequence[Microbatch],
    lr: float,
    judge: Judge = not_finite,
) -> StepResult:
    """Forward, backward, reduce, judge, clip, update: one step with this rank's share of the global batch.

    After a refused update weights, moments and Adam's count of steps are what they were, bit for bit.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    set_learning_rate(optimizer, lr)
    loss_weight, tokens = _global_sums(microbatches, session)
    get_model_config(chunks[0]).finalize_model_grads_func = partial(
        finalize_gradients, tp_group=session.groups.tp, loss_weight=loss_weight
    )
    router_loss_scale = loss_weight / tokens.clamp(min=1)
    losses = run_schedule(
        config, session, chunks, microbatches, forward_only=False, router_loss_scale=router_loss_scale
    )
    norm = gradient_norm(optimizer)
    loss_sums, weights, norms = _read_of_all_ranks(session, losses[0].sum(), loss_weight, norm)
    loss = sum(loss_sums) / session.groups.tp.size() / max(weights[0], 1e-30)
    # Equal on all ranks unless one of them is at fault; max() alone would pass over what is no number.
    grad_norm = sum(norms) if not all(map(math.isfinite, norms)) else max(norms)
    refused = judge(loss, grad_norm)
    if not refused:
        update(optimizer, norm, grad_norm)
    bad_ranks = tuple(rank for rank, number in enumerate(loss_sums) if not math.isfinite(number))
    return StepResult(*losses, loss_weight, loss, grad_norm, bad_ranks, refused)


@torch.no_grad()
def evaluate_step(
    config: NaViLConfig, session: Session, chunks: Chunks, microbatches: Sequence[Microbatch]
) -> StepResult:
    """Forward only, for held-out rows. Leaves gradients and weights alone."""
    loss_sums = run_schedule(config, session, chunks, microbatches, forward_only=True)
    return StepResult(*loss_sums, _global_sums(microbatches, session)[0])


def run_schedule(
    config: NaViLConfig,
    session: Session,
    chunks: Chunks,
    microbatches: Sequence[Microbatch],
    *,
    forward_only: bool,
    router_loss_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """megatron-core's schedule over this rank's microbatches. -> weighted loss sums by microbatch, and by group, 0 but
    on the last stage.

    ``router_loss_scale`` [2] is global weight over global tokens, of text and visual: a router's sum over its tokens
    times this, divided with all gradients by the weight, is their mean, at any layout and any number of microbatches.
    """
    num_groups = num_loss_groups(config)
    forward = partial(forward_step, num_groups=num_groups)
    losses = schedule_over(
        config, session, chunks, microbatches, forward, router_loss_scale=router_loss_scale, forward_only=forward_only
    )
    if not losses:
        shapes = ((len(microbatches),), (num_groups,))
        return torch.zeros(shapes[0], device=session.device), torch.zeros(shapes[1], device=session.device)
    by_group = torch.stack([entry["group_loss_sums"] for entry in losses])
    return torch.stack([entry["loss_sum"] for entry in losses]), by_group.sum(0)


def schedule_over(
    config: NaViLConfig,
    session: Session,
    chunks: Chunks,
    microbatches: Sequence[Microbatch],
    forward: Callable[..., Any],
    *,
    router_loss_scale: Tensor | None = None,
    **options: Any,
) -> list[Any]:
    """Run megatron-core's schedule for the layout. -> what the loss functions reported, on the last stage."""
    schedule = get_forward_backward_func(
        pp_size=session.groups.pp.size(), vp_size=config.parallel.virtual_pipeline_model_parallel_size
    )
    # Each chunk of the model asks for a microbatch at its own time.
    iterators = [
        upload_ahead(
            microbatches,
            session.platform,
            with_images=session.is_first_stage and number == 0,
            router_loss_scale=router_loss_scale,
        )
        for number in range(len(chunks))
    ]
    outputs: list[Any] = schedule(
        forward_step_func=forward,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=config.microbatch_tokens,
        micro_batch_size=1,
        **options,
    )
    for chunk in chunks:
        for module in chunk.modules():
            # Core marks a first microbatch, after which layers may hold what they made of their weights; no longer.
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = None
    return outputs


def forward_step(inputs: Iterator[ModelInputs], chunk: nn.Module, *, num_groups: int) -> tuple[Tensor, LossFunction]:
    """What the schedule calls for one microbatch and one chunk."""
    microbatch = next(inputs)
    return chunk(microbatch), partial(weighted_loss, microbatch, num_groups)


def weighted_loss(inputs: ModelInputs, num_groups: int, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Cross entropies [k] -> (weighted sum, number of predictions, what to report).

    Core divides the first by nothing, because ``calculate_per_token_loss`` is set, but changes it in place: the report
    is a copy.
    """
    weighted = losses * inputs.loss_weights
    loss_sum = weighted.sum()
    group_sums = weighted.new_zeros(num_groups).index_add(0, inputs.loss_groups, weighted.detach())
    count = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)
    return loss_sum, count, {"loss_sum": loss_sum.detach().clone(), "group_loss_sums": group_sums}


def finalize_gradients(
    chunks: Chunks,
    num_tokens: Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
    *,
    tp_group: ProcessGroup,
    loss_weight: Tensor,
) -> None:
    """Sum gradients over the ranks that share a parameter, then divide by the global weight.

    Core reduces over data, sequence and embedding groups. Ours is the sum over the tensor-parallel group for encoder
    and connector, whose ranks encode different images, and the division: core counts predictions as integers, while
    weights may be fractions.
    """
    finalize_model_grads(chunks, None, pg_collection, force_all_reduce)
    if tp_group.size() > 1:
        works = [
            torch.distributed.all_reduce(parameter.main_grad, group=tp_group, async_op=True)
            for chunk in chunks
            for parameter in chunk.parameters()
            if parameter.requires_grad and getattr(parameter, "sum_gradient_over_tensor_parallel", False)
        ]
        for work in works:
            work.wait()
    scaling = torch.where(loss_weight > 0, 1.0 / loss_weight, torch.zeros_like(loss_weight))
    for chunk in chunks:
        chunk.scale_gradients(scaling)


def _read_of_all_ranks(session: Session, *numbers: Tensor) -> Sequence[Sequence[float]]:
    """Each number, [] or [1], on every rank; the only read of a step."""
    mine = torch.cat([number.detach().float().reshape(1) for number in numbers])
    of_all = mine.new_empty(session.world_size * len(mine))
    torch.distributed.all_gather_into_tensor(of_all, mine)
    return of_all.view(session.world_size, -1).T.tolist()


def _global_sums(microbatches: Sequence[Microbatch], session: Session) -> tuple[Tensor, Tensor]:
    """Weight of the global batch, [] float32, and its text and visual tokens, [2] float32, padding not counted."""
    weight = sum(float(microbatch.loss_weights.sum(dtype="float64")) for microbatch in microbatches)
    visual = sum(microbatch.num_visual_tokens for microbatch in microbatches)
    tokens = sum(microbatch.num_tokens for microbatch in microbatches)
    # Filled on the device: a copy of a host tensor would make the host wait for it.
    numbers = (weight, tokens - visual, visual)
    sums = torch.stack([torch.full((), number, dtype=torch.float32, device=session.device) for number in numbers])
    torch.distributed.all_reduce(sums, group=session.groups.dp)
    return sums[0], sums[1:]
