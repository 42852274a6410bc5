"""Short runs of a small real model on one GPU, in BF16, whose sizes every FP8 recipe takes."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from navil_megatron.checkpoint.sharded import load_sharded, save_sharded
from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import validate
from navil_megatron.config.vision import VisionConfig
from navil_megatron.data.types import Microbatch
from navil_megatron.models.build import build_model
from navil_megatron.runtime.session import Launch, Session
from navil_megatron.training.batch import build_model_inputs
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.oracle import Composition, merge_sections
from tests.ranks import tiny_config
from tools.bench.synthetic import synthetic_microbatch

SEQ_LENGTH, VOCABULARY, PAD_TO = 512, 512, 128
MODEL = ModelConfig(
    language=LanguageConfig(
        family="qwen3",
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=64,
        vocab_size=VOCABULARY,
        qk_norm=True,
    ),
    vision=VisionConfig(num_layers=2, hidden_size=128, ffn_hidden_size=256, num_attention_heads=2),
    special_token_ids=tuple(range(VOCABULARY - len(SPECIAL_TOKENS), VOCABULARY)),
)
MIXED: Composition = ((60, ((8, 8), (4, 6))), (90, ()), (40, ((12, 10),)))
TEXT_ONLY: Composition = ((200, ()), (130, ()))
ENGINE = {"runtime": {"kernels": "transformer_engine"}}


@dataclass
class Outcome:
    """What some steps gave; tensors on the CPU, in FP32."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Those of the first step, of parameters that are trained."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    """The optimizer's count."""


def gpu_config(**sections: Any) -> NaViLConfig:
    """A run on one GPU; ``sections`` change it field by field. Gradients stay whole and unclipped."""
    defaults: dict[str, Any] = {
        "data": {"seq_length": SEQ_LENGTH, "max_image_pixels": 65_536, "pad_segments_to": PAD_TO},
        "training": {"global_batch_size": 1},
        "precision": {"type": "bf16"},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "epsilon": 1e-6, "distributed": False, "clip_grad": None},
        "runtime": {"device": "cuda", "cpu_threads": None},
    }
    config = tiny_config(model=MODEL, **merge_sections(defaults, sections))
    validate(config, 1)
    return config


def row(composition: Composition, seed: int = 0) -> Microbatch:
    """One row of this composition."""
    return synthetic_microbatch(MODEL, SEQ_LENGTH, seed, [composition], pad_segments_to=PAD_TO)


@contextmanager
def session_of(config: NaViLConfig, folder: Path) -> Iterator[Session]:
    """This process as the only rank."""
    logging = dataclasses.replace(config.logging, directory=str(folder))
    with Session.start(dataclasses.replace(config, logging=logging), Launch()) as session:
        yield session


def run(
    config: NaViLConfig,
    rows: Sequence[Microbatch],
    folder: Path,
    *,
    restore: Path | None = None,
    save: Path | None = None,
) -> Outcome:
    """A step on each row in turn, after ``restore`` is read and before ``save`` is written."""
    outcome = Outcome()
    with session_of(config, folder) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        if restore is not None:
            load_sharded(restore, session, chunks, optimizer)
        parameters = dict(chunks[0].module.named_parameters())
        for number, microbatch in enumerate(rows):
            result = train_step(config, session, chunks, optimizer, [microbatch], config.optimizer.lr)
            outcome.losses.append(float(result.loss_sum / result.loss_weight))
            if number == 0:
                trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
                outcome.gradients = {name: p.main_grad.float().cpu().clone() for name, p in trained.items()}
        outcome.weights = {name: parameter.detach().float().cpu() for name, parameter in parameters.items()}
        outcome.step = max(int(group["step"]) for group in optimizer.param_groups)
        if save is not None:
            save.mkdir()
            save_sharded(save, session, chunks, optimizer, {})
    return outcome


@torch.no_grad()
def forward(config: NaViLConfig, microbatch: Microbatch, folder: Path) -> dict[str, torch.Tensor]:
    """What the encoder, each decoder layer and the head give for a row, by name."""
    outputs: dict[str, torch.Tensor] = {}
    with session_of(config, folder) as session:
        (model,) = build_model(config, session.groups, session.device)
        inputs = session.platform.upload(build_model_inputs(microbatch))()
        assert inputs.first_stage is not None
        outputs["vision features"] = model.encode_images(inputs.first_stage).float().cpu()
        for layer in model.decoder.layers:
            layer.register_forward_hook(
                lambda module, _, output: outputs.update({f"layer {module.layer_number}": output[0].float().cpu()})
            )
        outputs["losses"] = model(inputs).float().cpu()
    return outputs


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; absolute where nothing is expected."""
    scale = expected.norm()
    return float((found - expected).norm() / (scale if scale > 0 else 1.0))
