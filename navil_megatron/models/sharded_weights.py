"""A chunk's weights as shards of the whole tensors, as the table of parameters says, so that any layout reads what
another wrote.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from navil_megatron.blueprint.experts_placement import local_experts
from navil_megatron.blueprint.parameters import EMBEDDING, Parameter, parameter_of
from navil_megatron.blueprint.vocabulary import held_rows, words_of_rank
from navil_megatron.config.model import ModelConfig


def shard_weights(
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    pg_collection: ProcessGroupCollection,
    first_layer: int,
    is_routed: bool,
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """What core saves and loads for each weight of a chunk that begins behind ``first_layer`` decoder layers.

    ``is_routed``: feed-forward experts have ranks of their own.
    """
    sharded: dict[str, ShardedTensor | ShardedTensorFactory] = {}
    for name, weight in weights.items():
        row, groups = parameter_of(model, name), pg_collection
        own = is_routed and row.num_experts is not None
        tensor, data = (groups.expt_tp, groups.expt_dp) if own else (groups.tp, groups.dp_cp)
        is_copy = row.key == EMBEDDING != name  # of the table, on a stage that does not embed
        replica = (int(is_copy), 0 if row.split_dim is not None else tensor.rank(), data.rank())
        cut = _Cut(row, layer_number(row, name, first_layer), groups.ep.rank(), groups.ep.size(), tensor)
        if row.split_blocks == 1 and not cut.is_stack and not row.is_vocabulary:
            (sharded[name],) = cut.pieces(row.key, weight, replica, None)
        else:
            sharded[name] = ShardedTensorFactory(row.key, weight, cut.pieces, cut.whole, replica)
    return sharded


def layer_number(row: Parameter, name: str, first_layer: int) -> int:
    """The number in the whole model of the layer that a chunk's parameter belongs to; 0 outside layers."""
    if row.num_layers is None:
        return 0
    number = int(name.split(".")[2])  # vision_encoder.layers.N. or decoder.layers.N.
    return number + (first_layer if name.startswith("decoder.") else 0)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where a rank's piece of a parameter lies in the whole one."""

    row: Parameter
    layer: int
    ep_rank: int
    ep_size: int
    group: torch.distributed.ProcessGroup

    @property
    def is_stack(self) -> bool:
        """Several experts of a modality have an axis before the matrix."""
        return (self.row.num_experts or 1) > 1

    def pieces(self, key: str, held: Tensor, replica_id: ReplicaId, _: None) -> list[ShardedTensor]:
        """Expert by expert, and block by block; of a table of the vocabulary the rows of words."""
        row, size, rank = self.row, self.group.size(), self.group.rank()
        if row.is_vocabulary:
            return [self._words(key, held, replica_id)]
        layer = ((0, self.layer, row.num_layers),) if row.num_layers else ()
        experts: tuple[tuple[tuple[int, int, int], ...], ...] = ((),)
        if self.is_stack and row.num_experts and row.modality:
            numbers = local_experts(self.ep_rank, self.ep_size, row.num_experts)[row.modality]
            experts = tuple(((len(layer), number, row.num_experts),) for number in numbers)
        found = []
        for expert, matrix in zip(experts, held if self.is_stack else [held], strict=True):
            # Core's optimizer knows a parameter by its identity, so one that is not cut stays itself.
            blocks = (matrix,) if row.split_blocks == 1 else matrix.chunk(row.split_blocks, dim=self._dim)
            for number, block in enumerate(blocks):
                place = (len(layer) + (row.split_dim or 0), number * size + rank, row.split_blocks * size)
                found.append(
                    ShardedTensor.from_rank_offsets(
                        key,
                        block,
                        *layer,
                        *expert,
                        *(() if row.split_dim is None else (place,)),
                        replica_id=replica_id,
                        prepend_axis_num=len(layer) + len(expert),
                    )
                )
        return found

    def whole(self, pieces: list[Tensor]) -> Tensor:
        """The inverse of ``pieces``."""
        if self.row.is_vocabulary:
            (rows,) = pieces
            return nn.functional.pad(rows, (0, 0, 0, held_rows(self.row.shape[0], self.group.size()) - len(rows)))
        blocks = self.row.split_blocks
        matrices = [torch.cat(pieces[first : first + blocks], self._dim) for first in range(0, len(pieces), blocks)]
        return torch.stack(matrices) if self.is_stack else matrices[0]

    def _words(self, key: str, held: Tensor, replica_id: ReplicaId) -> ShardedTensor:
        words = words_of_rank(self.row.shape[0], self.group.rank(), self.group.size())
        rows = held[: len(words)]
        # Where there are none, a copy of nothing: core loads into it, and does not save it.
        return ShardedTensor(
            key,
            rows,
            rows.dtype,
            local_shape=tuple(rows.shape),
            global_shape=self.row.shape,
            global_offset=(words.start, 0),
            axis_fragmentations=None,  # no grid: the last ranks hold fewer
            replica_id=replica_id if words else 1,
        )

    @property
    def _dim(self) -> int:
        return (self.row.split_dim or 0) - (self.is_stack and self.row.split_dim is not None)
