"""Samples that could not be read: one verdict for all ranks that work on them.

An image is decoded by one rank of a model replica, but its sample's loss is computed by others; a text is read by all.
So before a step the ranks of a replica tell one another, on the host, which samples failed.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from navil_megatron.data.assemble import drop_loss
from navil_megatron.data.types import Microbatch, SampleId
from navil_megatron.runtime.session import Session


def settle_failures(session: Session, microbatches: Sequence[Microbatch]) -> tuple[list[Microbatch], list[SampleId]]:
    """The microbatches without loss on what failed on any rank of the replica, and which samples that are.

    Every rank of a replica calls it with the same microbatches; the first that saw a failure keeps it on its list.
    """
    failed = [np.zeros(len(microbatch.samples), dtype=bool) for microbatch in microbatches]
    for flags, microbatch in zip(failed, microbatches, strict=True):
        flags[[failure.position for failure in microbatch.failures]] = True
    first = session.first_in_replica(np.concatenate(failed))
    parts = np.split(first, np.cumsum([len(flags) for flags in failed])[:-1])
    settled = []
    for microbatch, ranks in zip(microbatches, parts, strict=True):
        mine = tuple(failure for failure in microbatch.failures if ranks[failure.position] == session.rank)
        settled.append(replace(drop_loss(microbatch, np.flatnonzero(ranks >= 0).tolist()), failures=mine))
    samples = [sample for microbatch in microbatches for sample in microbatch.samples]
    return settled, [samples[position] for position in np.flatnonzero(first >= 0).tolist()]
