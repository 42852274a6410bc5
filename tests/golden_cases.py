"""Golden cases as model configs, whole tensors and model inputs."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.types import ALONE, IGNORED_LABEL, DataPlace, Microbatch, PackedRows, SampleId
from navil_megatron.hf.hf_config import model_config_from_hf
from navil_megatron.hf.jobs import ingest_jobs
from navil_megatron.models.inputs import FirstStageInputs, ModelInputs
from navil_megatron.training.batch import build_model_inputs
from tests.whole_checkpoint import hf_to_mcore

TEXT, VISUAL = MODALITIES


class GoldenCase:
    """One folder of ``public/cases`` with the model that it names."""

    def __init__(self, golden_dir: Path, name: str):
        public = golden_dir / "public"
        folder = public / "cases" / name
        self.meta = json.loads((folder / "meta.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "expected.safetensors")
        model_folder = public / self.meta["model"]
        ids = json.loads((model_folder / "special_tokens.json").read_text())["special_token_ids"]
        hf_config = json.loads((model_folder / "config.json").read_text())
        self.model: ModelConfig = model_config_from_hf(hf_config, [ids[token] for token in SPECIAL_TOKENS])
        self.hf_tensors = load_file(model_folder / "model.safetensors")
        self.whole = hf_to_mcore(self.hf_tensors, self.model)

    def microbatch(self, labels: np.ndarray, weights: np.ndarray, place: DataPlace = ALONE) -> Microbatch:
        """The case's row; ``labels`` and ``weights`` [S] are aligned with the predicting position."""
        inputs = self.inputs
        length = inputs["input_ids"].numel()
        cu_seqlens = inputs["cu_seqlens"].tolist() if "cu_seqlens" in inputs else [0, length]
        has_image = bool(inputs["image_flags"].any())
        patches = inputs["pixel_values"].float().flatten(1)
        rows = PackedRows(
            input_ids=inputs["input_ids"][0].numpy(),
            position_ids=inputs["position_ids"][0].numpy(),
            labels=labels,
            loss_weights=weights,
            visual_token_mask=inputs["visual_token_mask"][0].numpy(),
            segment_lengths=tuple(np.diff(cu_seqlens).tolist()),
            image_grid_thw=inputs["image_grid_thw"].numpy() if has_image else np.zeros((0, 3), np.int64),
            samples=(SampleId(0, 0),),
            sample_starts=(0,),
            sample_lengths=(length,),
        )
        return plan_microbatch(rows, self.model, place, patches if has_image else patches[:0])

    def shifted(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels and weights [S] of the plain or the weighted loss, at the position that predicts them."""
        labels = np.full(self.inputs["labels"].numel(), -100, dtype=np.int64)
        labels[:-1] = self.inputs["labels"][0, 1:].numpy()
        weights = np.zeros(labels.size, dtype=np.float32)
        if kind == "loss":
            labels[self.inputs["input_ids"][0].numpy() == self.model.special_token_id("<IMG_CONTEXT>")] = -100
            weights[labels != -100] = 1.0
        else:
            weights[:-1] = self.inputs["loss_weight"][0, 1:].numpy()
        return labels, weights

    def model_inputs(self, kind: str = "loss", place: DataPlace = ALONE) -> ModelInputs:
        """Inputs whose cross entropies give ``loss`` or ``loss_weighted``."""
        return build_model_inputs(self.microbatch(*self.shifted(kind), place))

    def image_inputs(self, place: DataPlace) -> FirstStageInputs | None:
        """A rank's images of a case that is of the encoder alone; image tokens stand for the row."""
        grids, patches = self.inputs["image_grid_thw"].numpy(), self.inputs["pixel_values"].float().flatten(1)
        length = len(patches) // self.model.vision.merge_size**2
        rows = PackedRows(
            input_ids=np.full(length, self.model.special_token_id("<IMG_CONTEXT>")),
            position_ids=np.arange(length),
            labels=np.full(length, IGNORED_LABEL),
            loss_weights=np.zeros(length, dtype=np.float32),
            visual_token_mask=np.ones(length, dtype=bool),
            segment_lengths=(length,),
            image_grid_thw=grids,
            samples=(SampleId(0, 0),),
            sample_starts=(0,),
            sample_lengths=(length,),
        )
        return build_model_inputs(plan_microbatch(rows, self.model, place, patches)).first_stage

    def expected_gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients under checkpoint keys, for every parameter all of whose pieces the case stores."""
        stored = {key.removeprefix("grad."): value for key, value in self.expected.items() if key.startswith("grad.")}
        gradients = {}
        for job in ingest_jobs(self.model):
            if all(slot.key in stored for slot in job.sources):
                (gradients[job.targets[0].name],) = job.function(tuple(stored[slot.key] for slot in job.sources))
        return gradients
