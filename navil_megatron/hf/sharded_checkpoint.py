"""The megatron-core checkpoint folder in one plain process: whole tensors in and out, no process groups.

megatron-core's ``torch_dist`` format is PyTorch's distributed checkpoint plus ``metadata.json`` and one object that
holds the common state, so PyTorch's reader and writer serve alone. The resolved config lies beside it.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from navil_megatron.config.errors import UserError
from navil_megatron.config.load import config_to_dict, section_from_dict
from navil_megatron.config.schema import ModelConfig
from navil_megatron.hf.verify import Signature

CONFIG_FILE = "navil_config.json"
"""The resolved config inside a checkpoint folder."""
OPTIMIZER_PREFIX = "optimizer."
"""Keys of tensors that are optimizer state."""
_COMMON_STATE_KEY = ShardedObject("common_state", None, (1,), (0,)).unique_key
_BACKEND = CheckpointingConfig("torch_dist", 1)


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
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): expected the config that the checkpoint was saved with"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise UserError(f"{path} has no model section: expected the config that the checkpoint was saved with")
    return config


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model section of a checkpoint's config.

    Raises:
        UserError: It is missing or wrong.
    """
    return section_from_dict(ModelConfig, read_config(checkpoint)["model"], str(checkpoint / CONFIG_FILE))


def read_signatures(checkpoint: Path) -> dict[str, Signature]:
    """Shape and type of every tensor that is not optimizer state, from the metadata alone.

    Raises:
        UserError: The folder is not a complete checkpoint.
    """
    if maybe_load_config(str(checkpoint)) is None:
        raise UserError(f"{checkpoint} has no metadata.json: not a complete megatron-core checkpoint")
    metadata = _guarded(checkpoint, distributed_checkpoint.FileSystemReader(checkpoint).read_metadata)
    return {
        key: (tuple(entry.size), entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith(OPTIMIZER_PREFIX)
    }


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor that is not optimizer state, whole, whatever layout saved it.

    Raises:
        UserError: The folder is not a complete checkpoint, or a file of it is damaged.
    """
    signatures = read_signatures(checkpoint)
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in signatures.items()}
    _guarded(
        checkpoint,
        lambda: distributed_checkpoint.load(
            tensors,
            storage_reader=distributed_checkpoint.FileSystemReader(checkpoint),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        ),
    )
    return tensors


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
    # Core reads the common state as a list with one object per process that saved it; weights alone have none.
    state: dict[str, Any] = {**tensors, _COMMON_STATE_KEY: [{}]}
    with _without_process_group():
        distributed_checkpoint.save(
            state,
            storage_writer=distributed_checkpoint.FileSystemWriter(folder),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    save_config(_BACKEND, str(folder))
    config = {"model": config_to_dict(model), "data": dict(data)}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def _without_process_group() -> Iterator[None]:
    """Torch warns that it assumes a single process; here that is the intent."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _guarded[T](checkpoint: Path, read: Callable[[], T]) -> T:
    """What ``read`` gives; what torch raises on a broken folder becomes one line."""
    try:
        with _without_process_group():
            return read()
    except (Exception, distributed_checkpoint.CheckpointException) as error:  # a damaged file raises a dozen types
        failures = getattr(error, "failures", {0: (error, None)})
        cause = next(iter(failures.values()))[0]
        reason = " ".join(f"{type(cause).__name__} {cause}".split())[:200]
        raise UserError(f"checkpoint {checkpoint} is damaged ({reason}); use an older one") from error
