"""From the folder of a pretrained LLM to a checkpoint that a NaViL's training starts from."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.load import config_to_dict, load_tables
from navil_megatron.config.training import SEED, TrainingConfig
from navil_megatron.files.atomic_folder import new_folder
from navil_megatron.files.checkpoint_folder import write_config
from navil_megatron.files.disk_space import require_space
from navil_megatron.files.json_file import read_json, values_of
from navil_megatron.hf.checkpoint.writer import CheckpointWriter
from navil_megatron.hf.convert import HowToRun, run_jobs
from navil_megatron.hf.exported.tokenizer_files import extend_tokenizer
from navil_megatron.hf.jobs import summary, total_bytes, with_types
from navil_megatron.hf.llm.start import ignored_llm_tensors, llm_start_jobs, model_config_for_llm
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.verify import WEIGHT_TYPES, require_tensors, type_name

TOKENIZER_FOLDER = "tokenizer"
"""The LLM's tokenizer with the special tokens, inside the checkpoint."""
MODEL_FILE = "model.toml"
"""The model section for the config of the run that starts from the checkpoint."""


def convert_llm(
    folder: Path,
    checkpoint: Path,
    config: Path | None,
    overrides: Iterable[str] = (),
    *,
    seed: int | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    **run: Unpack[HowToRun],
) -> dict[str, Any]:
    """Writes a checkpoint whose text experts are the LLM's; gives what was done, ready for JSON.

    The checkpoint also gets ``model.toml`` and the tokenizer (``tokenizer``: if it is not in the LLM's folder). The
    TOML file ``config``, with ``overrides`` over it, holds ``[model.vision]`` and whatever else of the run is set;
    its ``training.seed`` and the LLM's type of weights are taken where ``seed`` and ``dtype`` are ``None``.

    Raises:
        UserError: The folder is incomplete or does not fit the config; nothing is written then.
    """
    llm, tables = read_json(folder / "config.json"), load_tables(config, overrides)
    wanted = tables.get("model")
    if not isinstance(wanted, Mapping) or "vision" not in wanted:
        raise UserError(
            f"{folder} is a language model alone; give the encoder's sizes: --config with [model.vision], or settings "
            "as model.vision.num_layers=24"
        )
    seed = _seed(tables) if seed is None else seed
    reader = TensorFolder(folder)
    found = reader.signatures()
    with new_folder(checkpoint) as partial:
        ids = extend_tokenizer(tokenizer or folder, partial / TOKENIZER_FOLDER)
        with values_of(folder / "config.json"):
            model = model_config_for_llm(llm, wanted, ids)
        ignored = ignored_llm_tensors(found)
        types = {kind for key, (_, kind) in found.items() if key not in ignored}
        kind = dtype or next((kind for kind in WEIGHT_TYPES if types == {kind}), None)
        jobs = llm_start_jobs(llm, model, seed=seed, dtype=kind or torch.float32, stored=found)
        expected = {slot.key: slot.shape for job in jobs for slot in job.sources}
        require_tensors(found, expected, str(folder), ignored=ignored)
        if kind is None:
            raise UserError(f"{folder} holds {', '.join(sorted(map(type_name, types)))}; choose one type with --dtype")
        jobs = with_types(jobs, found, dtype)
        require_space(partial, total_bytes(jobs))
        run_jobs(jobs, reader, CheckpointWriter(partial), **run)
        named = str(checkpoint.absolute() / TOKENIZER_FOLDER)
        (partial / MODEL_FILE).write_text("\n".join(_toml("model", config_to_dict(model))) + "\n", encoding="utf-8")
        write_config(partial, {"model": config_to_dict(model), "data": {"tokenizer": named}})
    return {
        "folder": str(folder),
        "checkpoint": str(checkpoint),
        "family": model.language.family,
        "num_hf_tensors": len(found),
        **summary(jobs),
        "seed": seed,
        "tokenizer": named,
        "notes": [f"{checkpoint / MODEL_FILE} holds the [model] section for the run's config"],
    }


def _seed(tables: Mapping[str, Any]) -> int:
    training = tables.get("training", {})
    default = TrainingConfig.__dataclass_fields__["seed"].default
    seed = training.get("seed", default) if isinstance(training, Mapping) else None
    if type(seed) is not int or not SEED.holds(seed):
        raise UserError(f"training.seed is {seed!r}, expected a whole number, {SEED}")
    return seed


def _toml(section: str, values: Mapping[str, Any]) -> list[str]:
    """A section and those inside it, as lines of a config file."""
    lines = [f"[{section}]"]
    for name, value in values.items():
        if not isinstance(value, Mapping):
            lines.append(f"{name} = {json.dumps('none' if value is None else value)}")  # TOML has no null
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += ["", *_toml(f"{section}.{name}", value)]
    return lines
