"""From a Hugging Face folder to a checkpoint folder.

A folder is read as data: its Python files are never imported, and only JSON and safetensors files are opened.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.load import config_to_dict
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.files.atomic_folder import new_folder
from navil_megatron.files.checkpoint_folder import write_config
from navil_megatron.files.json_file import read_json, values_of
from navil_megatron.files.tokenizer_file import TOKENIZER_FILE
from navil_megatron.hf.checkpoint.writer import CheckpointWriter
from navil_megatron.hf.convert import HowToRun, run_jobs
from navil_megatron.hf.exported.image_settings import image_settings_from_hf
from navil_megatron.hf.exported.tokenizer_files import require_tokenizer
from navil_megatron.hf.hf_config import model_config_from_hf
from navil_megatron.hf.hf_parameters import hf_shapes
from navil_megatron.hf.jobs import ingest_jobs, summary, total_bytes, with_types
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.verify import mixed_types, require_tensors, require_valid_model


def convert_from_hf(
    folder: Path,
    checkpoint: Path,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    **run: Unpack[HowToRun],
) -> dict[str, Any]:
    """Writes a checkpoint that a run starts from (``checkpoint.initial_weights``); gives what was done, ready for JSON.

    ``folder`` is one of ours or of the authors. Without ``tokenizer`` the checkpoint names ``folder``, if that holds a
    tokenizer; without ``dtype`` the weights stay as they are.

    Raises:
        UserError: The folder is incomplete or is not a model that we have; nothing is written then.
    """
    config = read_json(folder / "config.json")
    model = model_of_folder(folder, config, tokenizer)
    with values_of(folder / "config.json"):
        data = image_settings_from_hf(folder, config, model)
    data["tokenizer"], notes = None, [f"no tokenizer: {folder} has none; name one when training or exporting"]
    if tokenizer is not None or (folder / TOKENIZER_FILE).is_file():
        data["tokenizer"], notes = str(require_tokenizer(tokenizer or folder).absolute()), []
    reader = TensorFolder(folder)
    found = reader.signatures()
    # Cast to one type, layers may differ in theirs.
    require_tensors(found, hf_shapes(model), str(folder), others=() if dtype else mixed_types(found, model))
    jobs = with_types(ingest_jobs(model), found, dtype)
    with new_folder(checkpoint, total_bytes(jobs)) as partial:
        run_jobs(jobs, reader, CheckpointWriter(partial), **run)
        write_config(partial, {"model": config_to_dict(model), "data": data})
    return {
        "folder": str(folder),
        "checkpoint": str(checkpoint),
        "family": model.language.family,
        "num_hf_tensors": len(found),
        **summary(jobs),
        "tokenizer": data["tokenizer"],
        "notes": notes,
    }


def model_of_folder(folder: Path, config: Mapping[str, Any], tokenizer: Path | None = None) -> ModelConfig:
    """The model section that the ``config.json`` of a NaViL folder describes.

    Raises:
        UserError: It describes none that we have, or holds values that are not what they should be.
    """
    path = folder / "config.json"
    with values_of(path):
        model = model_config_from_hf(config, _special_token_ids(folder, tokenizer, config))
        require_valid_model(model, str(path))
    return model


def _special_token_ids(folder: Path, tokenizer: Path | None, config: Mapping[str, Any]) -> Mapping[str, int] | None:
    """The special tokens' ids by the files of a folder, first of those that tell: tokenizer, config, lists of names."""
    if config.get("special_token_ids") is not None and not tokenizer:
        return None  # the config's own are taken
    for place in [tokenizer, folder] if tokenizer else [folder]:
        for name in ("special_tokens.json", "added_tokens.json", TOKENIZER_FILE):
            if (place / name).is_file():
                found = _ids_in(read_json(place / name), place / name)
                if all(token in found for token in SPECIAL_TOKENS):
                    return found
    return None


def _ids_in(content: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Names and ids in the shape of tokenizer.json, special_tokens.json or added_tokens.json."""
    added = content.get("added_tokens")
    try:
        if isinstance(added, list):
            return {entry["content"]: entry["id"] for entry in added}
        return dict(content.get("special_token_ids", content))
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path} holds no names and ids of tokens: download or copy it again") from None
