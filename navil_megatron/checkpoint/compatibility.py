"""Whether a checkpoint belongs to the configured run: same model, same optimizer, same weights.

The resolved config lies beside the tensors as ``navil_config.json``; what differs is named field by field.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.config.load import config_to_dict, differing_settings, section_from_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.renamed import with_new_names
from navil_megatron.config.run import NaViLConfig
from navil_megatron.files.checkpoint_folder import CONFIG_FILE, read_config

_ONLY_INITIAL = {
    "model.language.init_std",
    "model.language.visual_expert_init",
    "model.language.max_position_embeddings",
    "model.vision.init_std",
    "model.vision.layer_scale_init",
}
"""Fields that no longer matter once weights exist."""

_OPTIMIZER_SETTINGS = ("precision.type", "optimizer.distributed")  # what decides the form of the optimizer's state


def require_same_model(folder: Path, config: NaViLConfig, only_function: bool = False) -> None:
    """Compares the model section of a checkpoint with the config; ``only_function``: but for how weights are drawn.

    Raises:
        UserError: They differ; the message lists the fields.
    """
    # A setting that is younger than the checkpoint has its default there.
    stored = section_from_dict(ModelConfig, with_new_names(read_config(folder))["model"], str(folder / CONFIG_FILE))
    ignored = _ONLY_INITIAL if only_function else set()
    found = differing_settings("model", config_to_dict(stored), config_to_dict(config.model))
    if different := _described(pair for pair in found if pair[0] not in ignored):
        raise UserError(
            f"checkpoint {folder} is of another model: {'; '.join(different)}; "
            "use the config it was made with, or another checkpoint.directory"
        )


def require_same_optimizer(folder: Path, config: NaViLConfig) -> None:
    """Compares the settings that decide which optimizer state a checkpoint holds.

    Raises:
        UserError: They differ.
    """
    if different := _different_settings(folder, config, "training.phase", *_OPTIMIZER_SETTINGS):
        raise UserError(
            f"checkpoint {folder} cannot be continued: {'; '.join(different)}; start in another checkpoint.directory "
            "with this one as checkpoint.initial_weights"
        )


def require_kept_optimizer(folder: Path, config: NaViLConfig) -> None:
    """Compares the settings that decide in which form a checkpoint holds optimizer state; its phase may differ.

    Raises:
        UserError: They differ, or it holds weights alone, as a converted model does.
    """
    if different := _different_settings(folder, config, *_OPTIMIZER_SETTINGS):
        raise UserError(
            f"the optimizer state of checkpoint {folder} cannot be kept: {'; '.join(different)}; set these alike or "
            'checkpoint.initial_optimizer = "fresh"'
        )


def _different_settings(folder: Path, config: NaViLConfig, *names: str) -> list[str]:
    there, here = with_new_names(read_config(folder)), config_to_dict(config)
    found = (pair for section in here for pair in differing_settings(section, there.get(section), here[section]))
    return _described(pair for pair in found if pair[0] in names)


def require_keys(folder: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Compares the weights of a checkpoint with those of the model, by key and whole shape.

    Raises:
        UserError: Weights are missing, unexpected or of another shape; the message lists them all.
    """
    problems = [f"{key} is missing" for key in sorted(wanted.keys() - stored.keys())]
    problems += [f"{key} is unexpected" for key in sorted(stored.keys() - wanted.keys())]
    problems += [
        f"{key} is {list(stored[key])} there, {list(wanted[key])} in the model"
        for key in sorted(stored.keys() & wanted.keys())
        if stored[key] != wanted[key]
    ]
    if problems:
        raise UserError(f"checkpoint {folder} does not fit the model: {'; '.join(problems)}; use a matching config")


def _described(found: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{name} is {there!r} there, {here!r} here" for name, there, here in found]
