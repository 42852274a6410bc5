"""From a checkpoint folder to a folder that transformers loads.

The folder holds weights, config, processor settings, tokenizer, our own modelling code and a model card; it is used
with ``trust_remote_code=True`` and needs nothing of this package.
"""

import shutil
from pathlib import Path
from typing import Any, Unpack

import torch

from navil_megatron.blueprint.chat_template import default_system_message
from navil_megatron.config.errors import UserError
from navil_megatron.files.atomic_folder import new_folder
from navil_megatron.files.checkpoint_folder import CONFIG_FILE, read_config
from navil_megatron.files.json_file import values_of, write_json
from navil_megatron.files.tokenizer_file import TOKENIZER_FILE
from navil_megatron.hf.checkpoint.reader import open_checkpoint
from navil_megatron.hf.convert import HowToRun, run_jobs
from navil_megatron.hf.exported.image_settings import generation_config, image_settings_to_hf, preprocessor_config
from navil_megatron.hf.exported.model_card import model_card
from navil_megatron.hf.exported.tokenizer_files import copy_tokenizer, read_token_ids, settle_tokenizer
from navil_megatron.hf.hf_config import hf_config_from_model
from navil_megatron.hf.jobs import export_jobs, summary, targets, total_bytes, with_types
from navil_megatron.hf.safetensors_writer import SafetensorsWriter
from navil_megatron.hf.verify import type_name

REMOTE_CODE = Path(__file__).parent / "remote_code"


def convert_to_hf(
    checkpoint: Path,
    folder: Path,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5_000_000_000,
    **run: Unpack[HowToRun],
) -> dict[str, Any]:
    """Writes a folder that transformers loads offline; gives what was done, ready for JSON.

    Of a run's folder of checkpoints the newest is taken. Without ``tokenizer`` the one that the checkpoint names is
    copied; if there is none, the report says so. Without ``dtype`` the weights stay as stored.

    Raises:
        UserError: The checkpoint is incomplete or of another model; nothing is written then.
    """
    model, reader = open_checkpoint(checkpoint)
    source, found = reader.folder, reader.signatures()
    jobs = with_types(export_jobs(model), found, dtype)
    counts = summary(jobs) | {"num_tensors": len(found)}
    written = read_config(source)
    data = written.get("data") or {}
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
    with new_folder(folder, total_bytes(jobs)) as partial:
        files = run_jobs(jobs, reader, SafetensorsWriter(partial, targets(jobs), max_file_bytes), **run)
        write_json(partial / "generation_config.json", generation_config(token_ids, tokenizer))
        write_json(partial / "preprocessor_config.json", processor)
        for path in sorted(REMOTE_CODE.glob("*.py")):
            if path.name != "__init__.py":
                shutil.copyfile(path, partial / path.name)
        has_chat_template = False
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
            system_message = default_system_message(model, trained_here="training" in written)
            has_chat_template = settle_tokenizer(partial, system_message)
        card = model_card(
            model,
            counts["num_parameters"],
            has_tokenizer=tokenizer is not None,
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
        "num_hf_tensors": len(targets(jobs)),
        **counts,
        "files": files,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "notes": notes,
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
