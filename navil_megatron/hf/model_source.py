"""A checkpoint or a Hugging Face folder as a set of tensors under Hugging Face names, whichever of the two it is."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.checkpoint_folder import CONFIG_FILE, is_checkpoint
from navil_megatron.files.json_file import read_json
from navil_megatron.hf.checkpoint.reader import CheckpointReader, open_checkpoint
from navil_megatron.hf.hf_parameters import Slot
from navil_megatron.hf.ingest import model_of_folder
from navil_megatron.hf.jobs import Job, export_jobs, targets, with_types
from navil_megatron.hf.llm.start import is_bare_llm
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.verify import Signature

Kind = Literal["checkpoint", "NaViL folder", "LLM folder"]


def kind_of(path: Path) -> Kind:
    """What lies at a path.

    Raises:
        UserError: Nothing that can be converted.
    """
    if (path / "config.json").is_file():
        return "LLM folder" if is_bare_llm(read_json(path / "config.json")) else "NaViL folder"
    if is_checkpoint(path):
        return "checkpoint"
    raise UserError(
        f"{path} is neither a checkpoint ({CONFIG_FILE}) nor a Hugging Face folder (config.json); give the path of one"
    )


@dataclass(frozen=True)
class ModelSource:
    """The tensors of a model, wherever they are."""

    kind: Kind
    path: Path
    """The folder that holds them."""
    model: ModelConfig | None
    """``None`` for a bare LLM."""
    reader: CheckpointReader | TensorFolder
    jobs: dict[str, Job] = field(default_factory=dict)
    """Hugging Face key -> what makes its tensor; empty for a folder, which holds them as they are."""

    @cached_property
    def signatures(self) -> dict[str, Signature]:
        """Shape and type of every tensor, under Hugging Face names."""
        if not self.jobs:
            return self.reader.signatures()
        return {slot.key: (slot.shape, dtype) for slot, dtype in targets(self.jobs.values())}

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The tensor of a key, with those that are made of the same source."""
        job = self.jobs.get(key)
        if job is None:
            return {key: self.reader.read(Slot(key, self.signatures[key][0]))}
        made = job.function(tuple(map(self.reader.read, job.sources)))
        return {slot.key: tensor.contiguous() for slot, tensor in zip(job.targets, made, strict=True)}


def open_source(path: Path) -> ModelSource:
    """Opens a checkpoint or a folder; only headers are read.

    Raises:
        UserError: It is incomplete or damaged.
    """
    kind = kind_of(path)
    if kind != "checkpoint":
        described = None if kind == "LLM folder" else model_of_folder(path, read_json(path / "config.json"))
        return ModelSource(kind, path, described, TensorFolder(path))
    model, reader = open_checkpoint(path)
    jobs = with_types(export_jobs(model), reader.signatures(), None)
    return ModelSource(kind, reader.folder, model, reader, {slot.key: job for job in jobs for slot in job.targets})
