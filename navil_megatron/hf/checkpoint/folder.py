"""A megatron-core checkpoint in one plain process: its model, and whole tensors in and out.

Conversions stream through ``reader`` and ``writer``; what is here holds everything in memory, for
models that fit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.load import config_to_dict, section_from_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.checkpoint_folder import CONFIG_FILE, find_checkpoint, read_config, write_config
from navil_megatron.hf.checkpoint.reader import CheckpointReader
from navil_megatron.hf.checkpoint.writer import CheckpointWriter
from navil_megatron.hf.plan import Slot
from navil_megatron.hf.verify import require_valid_model


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model section of a checkpoint's config.

    Raises:
        UserError: It is missing or wrong.
    """
    where = str(checkpoint / CONFIG_FILE)
    model = section_from_dict(ModelConfig, read_config(checkpoint)["model"], where)
    require_valid_model(model, where)
    return model


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor that is not optimizer state, whole, whatever layout saved it.

    Raises:
        UserError: The folder is not a complete checkpoint, or a file of it is damaged.
    """
    reader = CheckpointReader(checkpoint)
    return {key: reader.read(Slot(key, shape)) for key, (shape, _) in reader.signatures().items()}


def read_whole_checkpoint(checkpoint: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The model config and every model tensor of a checkpoint, whole.

    Args:
        checkpoint: A checkpoint folder, or a run's folder of checkpoints (the newest is taken).

    Raises:
        UserError: There is no complete, undamaged checkpoint.
    """
    folder = find_checkpoint(checkpoint)
    return read_model_config(folder), read_tensors(folder)


def write_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig, data: Mapping[str, Any]
) -> None:
    """Writes whole tensors as a checkpoint that ranks of any layout load with megatron-core.

    Args:
        folder: An empty folder.
        tensors: Checkpoint key -> whole tensor.
        model: The model section of the config to leave beside them.
        data: What is known of the data section.
    """
    slots = {Slot(key, tuple(tensor.shape)): tensor for key, tensor in tensors.items()}
    writer = CheckpointWriter(folder, [(slot, tensor.dtype) for slot, tensor in slots.items()])
    writer.finish([writer.write(0, ((slot, tensor.contiguous()) for slot, tensor in slots.items()))])
    write_config(folder, {"model": config_to_dict(model), "data": data})
