"""Loss on held-out rows, at any layout, without touching gradients or optimizer."""

from collections.abc import Iterable
from itertools import batched

import torch

from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.types import Microbatch
from navil_megatron.runtime.session import Session
from navil_megatron.training.failures import settle_failures
from navil_megatron.training.step import Chunks, evaluate_step

MICROBATCHES_AT_ONCE = 8
"""Microbatches that go through the pipeline together."""


def evaluate(config: NaViLConfig, session: Session, chunks: Chunks, microbatches: Iterable[Microbatch]) -> float:
    """Weighted mean cross entropy over all ranks' microbatches; every rank has the same number of them. Samples that
    failed to decode count on no rank.
    """
    total = torch.zeros(2, dtype=torch.float64, device=session.device)
    for chunk in chunks:
        chunk.eval()
    for group in batched(microbatches, MICROBATCHES_AT_ONCE):
        settled, _ = settle_failures(session, group)
        result = evaluate_step(config, session, chunks, settled)
        total += torch.stack([result.loss_sum.double(), result.loss_weight.double()])
    for chunk in chunks:
        chunk.train()
    loss_sum, weight = total
    torch.distributed.all_reduce(loss_sum)
    return float(loss_sum / session.groups.tp.size() / weight)
