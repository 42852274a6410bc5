"""Train loss apart by source, and by whether a sample holds an image: which predictions belong together.

A packed row holds samples of several sources, so each prediction carries the number of its group. The host knows group
and weight; the device adds up losses.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.source_names import source_names
from navil_megatron.data.types import Microbatch, PackedRows

KINDS = ("text_only", "with_images")
"""Of samples; the groups are these of the first source, then these of the second, and so on."""


def num_loss_groups(config: NaViLConfig) -> int:
    """Groups of a run."""
    return len(KINDS) * len(config.data.train_sources)


def groups_of(rows: PackedRows) -> np.ndarray:
    """[t] int64: the group of each token's sample; 0 on padding, which predicts nothing."""
    groups = np.zeros(rows.input_ids.size, dtype=np.int64)
    for sample, start, length in zip(rows.samples, rows.sample_starts, rows.sample_lengths, strict=True):
        tokens = slice(start, start + length)
        groups[tokens] = len(KINDS) * sample.source + int(rows.visual_token_mask[tokens].any())
    return groups


def group_weights(microbatches: Iterable[Microbatch], num_groups: int) -> Tensor:
    """[groups] float64: weight of the predictions of each group, on the host."""
    weights = np.zeros(num_groups)
    for microbatch in microbatches:
        weights += np.bincount(microbatch.loss_groups, microbatch.loss_weights, num_groups)
    return torch.from_numpy(weights)


def losses_by_group(indexes: Sequence[str], loss_sums: Tensor, weights: Tensor) -> dict[str, float]:
    """What a record says: mean loss of each kind of samples and, of several sources, of each; absent without samples.

    ``indexes`` are the sources' index files, ``loss_sums`` and ``weights`` [groups] of all ranks, on the host.
    """
    sums = torch.stack([loss_sums, weights]).view(2, len(indexes), len(KINDS))
    named = {f"loss_{kind}": sums[:, :, number].sum(1) for number, kind in enumerate(KINDS)}
    if len(indexes) > 1:
        named |= {f"loss/{name}": sums[:, number].sum(1) for number, name in enumerate(source_names(indexes))}
    return {name: float(loss / weight) for name, (loss, weight) in named.items() if weight > 0}
