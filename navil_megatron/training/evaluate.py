"""Loss on held-out rows, at any layout, without touching gradients or optimizer."""

from collections.abc import Iterable
from itertools import batched

import torch

from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.assemble import drop_loss
from navil_megatron.data.types import Microbatch
from navil_megatron.runtime.session import Session
from navil_megatron.training.failures import settle_failures
from navil_megatron.training.step import Chunks, evaluate_step

MICROBATCHES_AT_ONCE = 8
"""Microbatches that go through the pipeline together, or a few more."""


def evaluate(config: NaViLConfig, session: Session, chunks: Chunks, microbatches: Iterable[Microbatch]) -> float:
    """Weighted mean cross entropy over all ranks' microbatches; every rank has the same number of them. Samples that
    failed to decode count on no rank.
    """
    total = torch.zeros(2, dtype=torch.float64, device=session.device)
    for chunk in chunks:
        chunk.eval()
    # The interleaved schedule takes microbatches in whole groups of one per stage: the last ones may be without loss.
    unit = session.groups.pp.size() if len(chunks) > 1 else 1
    for group in batched(microbatches, -(-MICROBATCHES_AT_ONCE // unit) * unit):
        settled, _ = settle_failures(session, group)
        silent = drop_loss(settled[-1], range(len(settled[-1].samples)))
        result = evaluate_step(config, session, chunks, settled + [silent] * (-len(settled) % unit))
        total += torch.stack([result.loss_sum.double(), result.loss_weight.double()])
    for chunk in chunks:
        chunk.train()
    loss_sum, weight = total
    torch.distributed.all_reduce(loss_sum)
    return float(loss_sum / session.groups.tp.size() / weight)
