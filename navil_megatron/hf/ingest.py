"""From Hugging Face tensors to checkpoint tensors, and from an HF folder to a checkpoint folder.

A folder is read as data: its Python files are never imported, and only JSON and safetensors files are opened.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import SPECIAL_TOKENS, ModelConfig
from navil_megatron.hf.atomic_folder import new_folder
from navil_megatron.hf.hf_config import model_config_from_hf
from navil_megatron.hf.image_settings import image_settings_from_hf
from navil_megatron.hf.param_map import table
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.sharded_checkpoint import read_tensors, write_tensors
from navil_megatron.hf.tokenizer_files import TOKENIZER_FILE
from navil_megatron.hf.transforms import stack_layers
from navil_megatron.hf.verify import WEIGHT_TYPES, require_hf_tensors, require_same_tensors, type_name


def hf_to_mcore(
    tensors: Mapping[str, torch.Tensor], model: ModelConfig, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Every parameter of the checkpoint, from the tensors of the HF files.

    Args:
        tensors: HF key -> tensor, all of one model; a lazy mapping is read once.
        model: The model's config.
        dtype: Type of the result; ``None``: as it is.

    Raises:
        UserError: A tensor is missing, unknown or of another shape or type; all of them are named.
    """
    signatures = tensors.signatures() if isinstance(tensors, TensorFolder) else _signatures(tensors)
    where = "the Hugging Face folder" if isinstance(tensors, TensorFolder) else "the set of tensors"
    require_hf_tensors(signatures, model, where, casting=dtype is not None)
    whole = {}
    for row in table(model):
        layers = [
            row.function.to_mcore(tuple(cast(tensors[key], dtype) for key in keys), model)
            for keys in row.hf_keys_of_layers()
        ]
        whole[row.mcore_key] = layers[0].contiguous() if row.num_layers is None else stack_layers(layers)
    return whole


def convert_from_hf(
    folder: Path,
    checkpoint: Path,
    *,
    tokenizer: Path | None = None,
    special_token_ids: Sequence[int] | Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Writes a checkpoint that training starts from (``checkpoint.initial_weights``).

    Args:
        folder: A Hugging Face folder of ours or of the authors.
        checkpoint: The checkpoint folder to make.
        tokenizer: Tokenizer folder to name in the checkpoint; default: ``folder``, if it holds one.
        special_token_ids: Ids of the special tokens where the folder does not tell them.
        dtype: Type of the weights; ``None``: as they are.
        verify: Read the checkpoint back and compare every bit.

    Returns:
        What was done, ready for JSON.

    Raises:
        UserError: The folder is incomplete or is not a model that we have; nothing is written then.
    """
    started = time.monotonic()
    require_weight_type(dtype)
    config = _read_json(folder / "config.json")
    if special_token_ids is None:
        special_token_ids = find_special_token_ids(folder, tokenizer, config)
    model = model_config_from_hf(config, special_token_ids)
    data = image_settings_from_hf(folder, config, model)
    source = tokenizer or folder
    has_tokenizer = (source / TOKENIZER_FILE).is_file()
    if tokenizer is not None and not has_tokenizer:
        raise UserError(f"{tokenizer} has no {TOKENIZER_FILE}: expected a folder with a fast tokenizer")
    data["tokenizer"] = str(source.absolute()) if has_tokenizer else None
    notes = [] if has_tokenizer else [f"no tokenizer: {folder} has none; name one when training or exporting"]
    tensors = TensorFolder(folder)
    whole = hf_to_mcore(tensors, model, dtype)
    with new_folder(checkpoint) as partial:
        write_tensors(partial, whole, model, data)
        if verify:
            require_same_tensors(read_tensors(partial), whole, str(partial))
    return {
        "folder": str(folder),
        "checkpoint": str(checkpoint),
        "family": model.language.family,
        "num_hf_tensors": len(tensors),
        **summary(whole),
        "tokenizer": data["tokenizer"],
        "verified": verify,
        "notes": notes,
        "seconds": round(time.monotonic() - started, 3),
    }


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in a type; ``None``: as it is."""
    return tensor if dtype is None else tensor.to(dtype)


def summary(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Counts of a set of tensors for a report."""
    return {
        "num_tensors": len(tensors),
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "num_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "types": sorted({type_name(tensor.dtype) for tensor in tensors.values()}),
    }


def require_weight_type(dtype: torch.dtype | None) -> None:
    """Refuses a type that weights cannot have."""
    if dtype is not None and dtype not in WEIGHT_TYPES:
        raise UserError(f"dtype {type_name(dtype)} is not supported, only {', '.join(map(type_name, WEIGHT_TYPES))}")


def find_special_token_ids(
    folder: Path, tokenizer: Path | None, config: Mapping[str, Any]
) -> Mapping[str, int] | Sequence[int] | None:
    """The special tokens' ids by the files of a folder, first of those that tell: tokenizer, config, lists of names."""
    sources = [tokenizer] if tokenizer else []
    if config.get("special_token_ids") is not None and not sources:
        return config["special_token_ids"]
    for place in [*sources, folder]:
        for name in ("special_tokens.json", "added_tokens.json", TOKENIZER_FILE):
            if (place / name).is_file():
                ids = _ids_in(_read_json(place / name))
                if all(token in ids for token in SPECIAL_TOKENS):
                    return ids
    return None


def _ids_in(content: Mapping[str, Any]) -> dict[str, int]:
    """Names and ids in the shape of tokenizer.json, special_tokens.json or added_tokens.json."""
    added = content.get("added_tokens")
    if isinstance(added, list):
        return {entry["content"]: entry["id"] for entry in added}
    return dict(content.get("special_token_ids", content))


def _signatures(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): expected a Hugging Face model folder") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content
