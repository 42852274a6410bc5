"""Checkpoints whole in memory, by the readers, writers and jobs that conversions stream through."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.load import config_to_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.checkpoint_folder import find_checkpoint, write_config
from navil_megatron.hf.checkpoint.reader import CheckpointReader
from navil_megatron.hf.checkpoint.writer import CheckpointWriter
from navil_megatron.hf.hf_parameters import Slot
from navil_megatron.hf.jobs import export_jobs, ingest_jobs
from navil_megatron.hf.verify import read_model_config


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor that is not optimizer state, whole, whatever layout saved it."""
    reader = CheckpointReader(checkpoint)
    return {key: reader.read(Slot(key, shape)) for key, (shape, _) in reader.signatures().items()}


def read_whole_checkpoint(checkpoint: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The model config and every model tensor of a checkpoint, or of the newest one of a run."""
    folder = find_checkpoint(checkpoint)
    return read_model_config(folder), read_tensors(folder)


def write_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig, data: Mapping[str, Any]
) -> None:
    """Writes whole tensors, stacks of layers in one chunk, without checksums."""
    slots = {Slot(key, tuple(tensor.shape)): tensor for key, tensor in tensors.items()}
    writer = CheckpointWriter(folder)
    writer.finish([writer.write(0, ((slot, tensor.contiguous()) for slot, tensor in slots.items()))])
    write_config(folder, {"model": config_to_dict(model), "data": data})


def hf_to_mcore(tensors: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Every parameter of the checkpoint, from the tensors of the HF files."""
    layers: dict[str, list[torch.Tensor]] = {}
    stacked = set()
    for job in ingest_jobs(model):
        ((slot,), (made,)) = job.targets, job.function(tuple(tensors[source.key] for source in job.sources))
        layers.setdefault(slot.key, []).append(made)
        if slot.layer is not None:
            stacked.add(slot.key)
    return {key: torch.stack(made) if key in stacked else made[0].contiguous() for key, made in layers.items()}


def mcore_to_hf(tensors: Mapping[str, torch.Tensor], model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every HF key and its tensor, from the tensors of a checkpoint."""
    for job in export_jobs(model):
        (slot,) = job.sources
        whole = tensors[slot.key]
        made = job.function((whole if slot.layer is None else whole[slot.layer],))
        yield from zip((target.key for target in job.targets), made, strict=True)
