"""Whole tensors in and out of model chunks at any layout, through the same sharding that checkpoints use, and out of
checkpoints.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def shards(chunk) -> Iterator[tuple[str, ShardedTensor]]:
    """(parameter name, shard) of one chunk; data of a shard is a view of the parameter."""
    for name, value in chunk.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None)).items():
        if isinstance(value, ShardedTensorFactory):
            for shard in value.build():
                yield name, shard
        elif isinstance(value, ShardedTensor):
            yield name, value


def _slices(shard: ShardedTensor) -> tuple:
    index: list = list(shard.global_offset[: shard.prepend_axis_num])
    offsets = shard.global_offset[shard.prepend_axis_num :]
    return tuple(index + [slice(o, o + n) for o, n in zip(offsets, shard.data.shape, strict=True)])


@torch.no_grad()
def load_whole(chunks, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the chunks' parameters from whole tensors; every key must be used by the caller's ranks together."""
    for chunk in chunks:
        for _, shard in shards(chunk):
            shard.data.copy_(tensors[shard.key][_slices(shard)])


def slices_of(chunks, attribute: str = "data") -> list[tuple[str, tuple, tuple, torch.Tensor]]:
    """(key, whole shape, index, values) of every parameter or gradient that these chunks hold."""
    found = []
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        sharded = chunk.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))
        for name, value in sharded.items():
            parameter = parameters.get(name)
            if parameter is None:
                continue
            tensor = parameter.data if attribute == "data" else getattr(parameter, attribute, None)
            if tensor is None:
                continue
            if isinstance(value, ShardedTensorFactory):
                value.data = tensor
                pieces = value.build()
            else:
                value.data = tensor
                pieces = [value]
            found += [(p.key, p.global_shape, _slices(p), p.data.detach().clone()) for p in pieces]
    return found


def assemble(slices) -> dict[str, torch.Tensor]:
    """Whole tensors from the slices of all ranks; slices of replicas must agree in shape and cover everything."""
    whole: dict[str, torch.Tensor] = {}
    for key, shape, index, values in slices:
        if key not in whole:
            whole[key] = torch.full(shape, float("nan"), dtype=values.dtype)
        whole[key][index] = values
    return whole


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and optimizer state, read by torch alone in one process without any layout.

    The reader that exports use leaves the optimizer state out.
    """
    reader = FileSystemReader(folder)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
