"""The megatron-core checkpoint folder in one plain process: which one, its config, and whole tensors in and out.

Conversions stream through ``reader`` and ``writer``; what is here holds everything in memory, for
models that fit.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.load import config_to_dict, section_from_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf.checkpoint.metadata import OPTIMIZER_PREFIX as OPTIMIZER_PREFIX
from navil_megatron.hf.checkpoint.reader import CheckpointReader
from navil_megatron.hf.checkpoint.writer import CheckpointWriter
from navil_megatron.hf.plan import Slot
from navil_megatron.hf.verify import require_valid_model

CONFIG_FILE = "navil_config.json"
"""The resolved config inside a checkpoint folder."""


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder itself, or the newest complete one in a run's folder of checkpoints.

    Raises:
        UserError: There is none.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    steps = [entry for entry in path.glob("step_*") if entry.name.removeprefix("step_").isdigit()]
    complete = [entry for entry in steps if (entry / CONFIG_FILE).is_file()]
    if not complete:
        raise UserError(f"{path} holds no checkpoint: expected {CONFIG_FILE} in it, or step_* folders with one")
    return max(complete)


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The resolved config of a checkpoint as plain values.

    Raises:
        UserError: The file is missing or is not JSON with a model section.
    """
    path = checkpoint / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): expected the config that the checkpoint was saved with"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise UserError(f"{path} has no model section: expected the config that the checkpoint was saved with")
    if not isinstance(config.get("data") or {}, dict):
        raise UserError(f"{path} has a data section that is no table: expected the config of the checkpoint")
    return config


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model section of a checkpoint's config.

    Raises:
        UserError: It is missing or wrong.
    """
    where = str(checkpoint / CONFIG_FILE)
    model = section_from_dict(ModelConfig, read_config(checkpoint)["model"], where)
    require_valid_model(model, where)
    return model


def write_config(folder: Path, model: ModelConfig, data: Mapping[str, Any]) -> None:
    """Leaves the model section, and what is known of the data section, in a checkpoint; complete it is then."""
    config = {"model": config_to_dict(model), "data": dict(data)}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


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
    write_config(folder, model, data)
