"""From Hugging Face tensors to checkpoint tensors, and from an HF folder to a checkpoint folder.

A folder is read as data: its Python files are never imported, and only JSON and safetensors files are opened.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.files.atomic_folder import new_folder, require_new
from navil_megatron.files.json_file import read_json, values_of
from navil_megatron.hf.checkpoint.folder import write_config
from navil_megatron.hf.checkpoint.reader import CheckpointReader
from navil_megatron.hf.checkpoint.writer import CheckpointWriter
from navil_megatron.hf.convert import run_steps, targets, total_bytes, with_types
from navil_megatron.hf.exported.image_settings import image_settings_from_hf
from navil_megatron.hf.exported.tokenizer_files import TOKENIZER_FILE
from navil_megatron.hf.hf_config import model_config_from_hf
from navil_megatron.hf.jobs import OnProgress
from navil_megatron.hf.param_map import table
from navil_megatron.hf.plan import plan_ingest
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.transforms import stack_layers
from navil_megatron.hf.verify import require_hf_tensors, require_valid_model, require_weight_type, summary


def hf_to_mcore(
    tensors: Mapping[str, torch.Tensor], model: ModelConfig, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Every parameter of the checkpoint, from the tensors of the HF files, all in memory.

    Args:
        tensors: HF key -> tensor, all of one model.
        model: The model's config.
        dtype: Type of the result; ``None``: as it is.

    Raises:
        UserError: A tensor is missing, unknown or of another shape or type; all of them are named.
    """
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    require_hf_tensors(found, model, "the set of tensors", casting=dtype is not None)
    whole = {}
    for row in table(model):
        layers = [
            row.function.to_mcore(tuple(tensors[key].to(dtype or tensors[key].dtype) for key in keys), model)
            for keys in row.hf_keys_of_layers()
        ]
        whole[row.parameter.key] = layers[0].contiguous() if row.parameter.num_layers is None else stack_layers(layers)
    return whole


def convert_from_hf(
    folder: Path,
    checkpoint: Path,
    *,
    tokenizer: Path | None = None,
    special_token_ids: Sequence[int] | Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    jobs: int = 1,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint that training starts from (``checkpoint.initial_weights``).

    Args:
        folder: A Hugging Face folder of ours or of the authors.
        checkpoint: The checkpoint folder to make.
        tokenizer: Tokenizer folder to name in the checkpoint; default: ``folder``, if it holds one.
        special_token_ids: Ids of the special tokens where the folder does not tell them.
        dtype: Type of the weights; ``None``: as they are.
        verify: Read the checkpoint back and compare every bit.
        jobs: Processes that work at the same time.
        on_progress: Is told the bytes that are done and the bytes in all.

    Returns:
        What was done, ready for JSON.

    Raises:
        UserError: The folder is incomplete or is not a model that we have; nothing is written then.
    """
    started = time.monotonic()
    require_weight_type(dtype)
    require_new(checkpoint)
    config = read_json(folder / "config.json")
    model = model_of_folder(folder, config, tokenizer, special_token_ids)
    with values_of(folder / "config.json"):
        data = image_settings_from_hf(folder, config, model)
    data["tokenizer"], notes = _find_tokenizer(folder, tokenizer)
    reader = TensorFolder(folder)
    found = reader.signatures()
    require_hf_tensors(found, model, str(folder), casting=dtype is not None)
    steps = with_types(plan_ingest(model), found, dtype)
    with new_folder(checkpoint, total_bytes(steps)) as partial:
        writer = CheckpointWriter(partial, targets(steps))
        run_steps(steps, reader, writer, CheckpointReader, jobs=jobs, verify=verify, on_progress=on_progress)
        write_config(partial, model, data)
    return {
        "folder": str(folder),
        "checkpoint": str(checkpoint),
        "family": model.language.family,
        "num_hf_tensors": len(found),
        **summary(found, dtype),
        "num_tensors": len({slot.key for slot, _ in targets(steps)}),
        "tokenizer": data["tokenizer"],
        "verified": verify,
        "notes": notes,
        "seconds": round(time.monotonic() - started, 3),
    }


def model_of_folder(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: Path | None = None,
    special_token_ids: Sequence[int] | Mapping[str, int] | None = None,
) -> ModelConfig:
    """The model section that the ``config.json`` of a NaViL folder describes.

    Raises:
        UserError: It describes none that we have, or holds values that are not what they should be.
    """
    path = folder / "config.json"
    with values_of(path):
        if special_token_ids is None:
            special_token_ids = find_special_token_ids(folder, tokenizer, config)
        model = model_config_from_hf(config, special_token_ids)
        require_valid_model(model, str(path))
    return model


def find_special_token_ids(
    folder: Path, tokenizer: Path | None, config: Mapping[str, Any]
) -> Mapping[str, int] | Sequence[int] | None:
    """The special tokens' ids by the files of a folder, first of those that tell: tokenizer, config, lists of names."""
    sources = [tokenizer] if tokenizer else []
    if config.get("special_token_ids") is not None and not sources:
        ids: Sequence[int] = config["special_token_ids"]
        return ids
    for place in [*sources, folder]:
        for name in ("special_tokens.json", "added_tokens.json", TOKENIZER_FILE):
            if (place / name).is_file():
                found = _ids_in(read_json(place / name), place / name)
                if all(token in found for token in SPECIAL_TOKENS):
                    return found
    return None


def _find_tokenizer(folder: Path, given: Path | None) -> tuple[str | None, list[str]]:
    """The tokenizer folder to name in the checkpoint, and what to tell if there is none."""
    source = given or folder
    if (source / TOKENIZER_FILE).is_file():
        return str(source.absolute()), []
    if given is not None:
        raise UserError(f"{given} has no {TOKENIZER_FILE}: expected a folder with a fast tokenizer")
    return None, [f"no tokenizer: {folder} has none; name one when training or exporting"]


def _ids_in(content: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Names and ids in the shape of tokenizer.json, special_tokens.json or added_tokens.json."""
    added = content.get("added_tokens")
    try:
        if isinstance(added, list):
            return {entry["content"]: entry["id"] for entry in added}
        return dict(content.get("special_token_ids", content))
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path} holds no names and ids of tokens: download or copy it again") from None
