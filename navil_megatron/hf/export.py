"""From checkpoint tensors to Hugging Face tensors, and from a checkpoint folder to a folder that transformers loads.

The folder holds weights, config, processor settings, tokenizer, our own modelling code and a model card; it is used
with ``trust_remote_code=True`` and needs nothing of this package.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.atomic_folder import new_folder, require_new
from navil_megatron.files.json_file import values_of, write_json
from navil_megatron.hf.checkpoint.folder import CONFIG_FILE, find_checkpoint, read_config, read_model_config
from navil_megatron.hf.checkpoint.reader import CheckpointReader
from navil_megatron.hf.convert import run_steps, targets, total_bytes, with_types
from navil_megatron.hf.exported.image_settings import generation_config, image_settings_to_hf, preprocessor_config
from navil_megatron.hf.exported.model_card import model_card
from navil_megatron.hf.exported.portable_tokenizer import settle_tokenizer
from navil_megatron.hf.exported.tokenizer_files import TOKENIZER_FILE, copy_tokenizer, read_token_ids
from navil_megatron.hf.hf_config import hf_config_from_model
from navil_megatron.hf.jobs import OnProgress
from navil_megatron.hf.param_map import table
from navil_megatron.hf.plan import plan_export
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.safetensors_writer import SafetensorsWriter
from navil_megatron.hf.transforms import unstack_layers
from navil_megatron.hf.verify import require_mcore_tensors, require_weight_type, summary, type_name

MAX_PART_BYTES = 5_000_000_000
REMOTE_CODE = Path(__file__).parent / "remote_code"


def mcore_to_hf(tensors: Mapping[str, torch.Tensor], model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every HF key and its tensor, from the tensors of a checkpoint; views where nothing has to move.

    Raises:
        UserError: A tensor is missing, unknown or of another shape or type; all of them are named.
    """
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    require_mcore_tensors(found, model, "the set of tensors")
    for row in table(model):
        whole = tensors[row.parameter.key]
        layers = (whole,) if row.parameter.num_layers is None else unstack_layers(whole)
        for keys, layer in zip(row.hf_keys_of_layers(), layers, strict=True):
            yield from zip(keys, row.function.to_hf(layer, model), strict=True)


def convert_to_hf(
    checkpoint: Path,
    folder: Path,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    max_part_bytes: int = MAX_PART_BYTES,
    verify: bool = True,
    jobs: int = 1,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Writes a folder that transformers loads offline.

    Args:
        checkpoint: A checkpoint folder, or a run's folder of checkpoints (the newest is taken).
        folder: The Hugging Face folder to make.
        tokenizer: Tokenizer folder; default: the one that the checkpoint names. Without any, none is copied and the
            report says so.
        dtype: Type of the weights; ``None``: as stored.
        max_part_bytes: Largest safetensors file.
        verify: Read the weights back and compare every bit.
        jobs: Processes that work at the same time.
        on_progress: Is told the bytes that are done and the bytes in all.

    Returns:
        What was done, ready for JSON.

    Raises:
        UserError: The checkpoint is incomplete or of another model; nothing is written then.
    """
    started = time.monotonic()
    require_weight_type(dtype)
    require_new(folder)
    source = find_checkpoint(checkpoint)
    model = read_model_config(source)
    data = read_config(source).get("data") or {}
    reader = CheckpointReader(source)
    found = reader.signatures()
    require_mcore_tensors(found, model, f"checkpoint {source}")
    tokenizer, notes = _find_tokenizer(tokenizer, data.get("tokenizer"))
    token_ids = {} if tokenizer is None else read_token_ids(tokenizer, model)
    with values_of(source / CONFIG_FILE):
        config = hf_config_from_model(
            model,
            dtype=type_name(dtype or found["embedding.word_embeddings.weight"][1]),
            token_ids=token_ids,
            image_settings=image_settings_to_hf(data, model),
        )
        processor = preprocessor_config(data, model)
    steps = with_types(plan_export(model), found, dtype)
    counts = summary(found, dtype)
    with new_folder(folder, total_bytes(steps)) as partial:
        writer = SafetensorsWriter(partial, targets(steps), max_part_bytes)
        parts = run_steps(steps, reader, writer, TensorFolder, jobs=jobs, verify=verify, on_progress=on_progress)
        write_json(partial / "generation_config.json", generation_config(token_ids, tokenizer))
        write_json(partial / "preprocessor_config.json", processor)
        _copy_code(partial)
        has_chat_template = False
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
            has_chat_template = settle_tokenizer(partial, model)
        card = model_card(
            model,
            counts["num_parameters"],
            tokenizer is not None,
            has_chat_template=has_chat_template,
            checkpoint=source,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        # Last: without it, nothing loads the folder.
        write_json(partial / "config.json", config)
    return {
        "checkpoint": str(source),
        "folder": str(folder),
        "family": model.language.family,
        "num_hf_tensors": len(targets(steps)),
        **counts,
        "parts": parts,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "verified": verify,
        "notes": notes,
        "seconds": round(time.monotonic() - started, 3),
    }


def _find_tokenizer(given: Path | None, named: str | None) -> tuple[Path | None, list[str]]:
    """The tokenizer folder to export, and what to tell if there is none."""
    if given is not None:
        return given, []
    if named is None:
        return None, ["no tokenizer exported: the checkpoint names none; give one, or add its files to the folder"]
    if not isinstance(named, str) or not (Path(named) / TOKENIZER_FILE).is_file():
        raise UserError(
            f"the checkpoint's tokenizer {named} has no {TOKENIZER_FILE} there; give the folder where it lies now"
        )
    return Path(named), []


def _copy_code(folder: Path) -> None:
    for path in sorted(REMOTE_CODE.glob("*.py")):
        if path.name != "__init__.py":
            shutil.copyfile(path, folder / path.name)
