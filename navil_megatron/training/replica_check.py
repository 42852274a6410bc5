"""Silent corruption: the data-parallel replicas of a weight are made by the same arithmetic and have the same bits.

Each rank sums the bits of each of its weights as integers, which one flipped bit always changes, and the ranks that
hold the same weights compare. Under the distributed optimizer FP32 weights and moments have no replica, so a fault in
them is not seen.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from navil_megatron.blueprint.parameters import parameter_of
from navil_megatron.models.sharded_weights import layer_number
from navil_megatron.training.overlap import gather_parameters

_BITS = {2: torch.int16, 4: torch.int32}


class ReplicaCheck:
    """The weights of this rank, and who else holds them."""

    def __init__(self, groups: ProcessGroupCollection, chunks: Sequence[DistributedDataParallel]):
        self._chunks = chunks
        self._held: list[tuple[ProcessGroup, dict[str, Tensor]]] = []
        named = {}
        for model in (chunk.module for chunk in chunks):
            for name, parameter in model.named_parameters():
                row = parameter_of(model.model, name)
                # By its layer in the whole model: chunks of a stage number their own alike.
                named[row.name(layer_number(row, name, model.first_layer))] = parameter
        # Core's mark of a parameter that has fewer replicas than the dense ones.
        own = {name: parameter for name, parameter in named.items() if not getattr(parameter, "allreduce", True)}
        dense = {name: parameter for name, parameter in named.items() if name not in own}
        for group, held in ((groups.dp_cp, dense), (groups.expt_dp, own)):
            if held and group.size() > 1:
                self._held.append((group, held))

    def difference(self) -> str:
        """The first weights of this rank that differ, and the ranks; empty: none does. A collective."""
        gather_parameters(self._chunks)
        return "; ".join(found for group, held in self._held if (found := _difference(group, held)))


def odd_ranks(sums: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """The ranks that differ from most of them; all of them, where there is no such majority."""
    (common, count), *_ = Counter(sums).most_common()
    return [rank for rank, number in zip(ranks, sums, strict=True) if number != common or 2 * count <= len(sums)]


@torch.no_grad()
def _difference(group: ProcessGroup, held: dict[str, Tensor]) -> str:
    sums = torch.stack([weight.view(_BITS[weight.itemsize]).sum(dtype=torch.int64) for weight in held.values()])
    of_all = [torch.empty_like(sums) for _ in range(group.size())]
    torch.distributed.all_gather(of_all, sums, group=group)
    ranks = torch.distributed.get_process_group_ranks(group)
    for name, numbers in zip(held, torch.stack(of_all, 1).tolist(), strict=True):
        if len(set(numbers)) > 1:
            odd = odd_ranks(numbers, ranks)
            names = ", ".join(map(str, odd))
            which = f"rank {names} differs from the others" if len(odd) < len(ranks) else f"ranks {names} differ"
            return f"{name}: {which} of ranks {', '.join(map(str, ranks))}"
    return ""
