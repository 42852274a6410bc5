"""Short runs of a small model in BF16, of sizes that every FP8 recipe takes, on any ranks of any device."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from navil_megatron.checkpoint.sharded import load_sharded, read_contents, stage_sharded
from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.config.precision import padding_of_segments
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import validate
from navil_megatron.config.vision import VisionConfig
from navil_megatron.data.types import ALONE, IGNORED_LABEL, Microbatch
from navil_megatron.models.build import build_model
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import build_model_inputs, place_of
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.overlap import gather_parameters
from navil_megatron.training.step import train_step
from tests.oracle import Composition, global_loss, merge_sections
from tests.ranks import start_session, tiny_config
from tests.whole import assemble, slices_of
from tools.bench.synthetic import synthetic_microbatch

SEQ_LENGTH, VOCABULARY, PAD_TO = 256, 512, 128
NUM_LABELS = 8
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
MIXED: Composition = ((30, ((8, 8), (4, 6))), (50, ()), (20, ((12, 10),)))
TEXT_ONLY: Composition = ((150, ()), (90, ()))
IMAGE_ONLY: Composition = ((1, ((16, 16),)), (1, ((12, 8), (4, 4))))
ENGINE = {"runtime": {"kernels": "transformer_engine"}}
FUSED_SUMS = {"runtime": {"kernels": "transformer_engine", "gradient_accumulation_fusion": "transformer_engine"}}
LEARN = {"lr": 5e-4, "epsilon": 1e-5}
"""So slow that losses follow the rounding of weights smoothly: at twice the rate two roundings part by 1 % and more."""
SMOOTH = {"lr": 1.0, "epsilon": 0.1, "weight_decay": 0.0}
"""Updates that are nearly the gradient times 10: Adam divides it by its own size and the large epsilon, so that what is
nothing but rounding noise moves no weight by a whole learning rate."""
FAR = {**SMOOTH, "lr": 1e4}
"""A step so long that no weight's change is lost in BF16."""


@dataclass
class Outcome:
    """What some steps gave on one rank; tensors on the CPU, in FP32."""

    losses: list[float] = field(default_factory=list)
    """Of the global batch of each step."""
    grad_norms: list[float] = field(default_factory=list)
    gradients: list = field(default_factory=list)
    """Slices of the first step's, of parameters that are trained, where this rank has them whole."""
    weights: list = field(default_factory=list)
    """Slices, after the last step."""
    step: int = 0
    """The optimizer's count."""
    calls: Counter[str] = field(default_factory=Counter)
    """Of the stand-in's functions; none on a GPU."""


def run_config(device: str, **sections: Any) -> NaViLConfig:
    """A run on ranks of a device; ``sections`` change it field by field. Gradients stay whole and unclipped."""
    defaults: dict[str, Any] = {
        "data": {"seq_length": SEQ_LENGTH, "max_image_pixels": 65_536, "pad_segments_to": PAD_TO},
        "training": {"global_batch_size": 4},
        "precision": {"type": "bf16"},
        "optimizer": {**LEARN, "warmup_steps": 0, "distributed": False, "clip_grad": None},
        "runtime": {"device": device, "cpu_threads": 1},
    }
    merged = merge_sections(defaults, sections)
    changes = merged.pop("model", {})
    parts = {name: dataclasses.replace(getattr(MODEL, name), **fields) for name, fields in changes.items()}
    return tiny_config(model=dataclasses.replace(MODEL, **parts), **merged)


def row(config: NaViLConfig, composition: Composition, seed: int, session: Session | None = None) -> Microbatch:
    """One row of this composition, planned for a rank; without one for a run's only rank.

    What is to be predicted follows from the token before it, so that a model learns from rows that it never saw again.
    """
    place = ALONE if session is None else place_of(session)
    padding = padding_of_segments(config.precision, config.data, config.parallel)
    drawn = synthetic_microbatch(
        config.model, config.data.seq_length, seed, [composition], pad_segments_to=padding, place=place
    )
    labels = np.where(drawn.labels == IGNORED_LABEL, IGNORED_LABEL, drawn.input_ids % NUM_LABELS)
    return dataclasses.replace(drawn, labels=labels)


def run_steps(
    rank: int,
    world_size: int,
    config: NaViLConfig,
    steps: Sequence[Sequence[Composition]],
    restore: Path | None = None,
    save: Path | None = None,
) -> Outcome:
    """A step on each global batch in turn, after ``restore`` is read and before ``save`` is written.

    Rows of a step are numbered through, each with its own seed, and dealt out to the data-parallel ranks.
    """
    validate(config, world_size)
    outcome = Outcome()
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        if restore is not None:
            load_sharded(restore, read_contents(restore), session, chunks, optimizer)
        calls = _calls(config)
        replicas = session.groups.dp.size() * session.groups.cp.size()
        seed = 0
        for number, compositions in enumerate(steps):
            rows = [row(config, composition, seed + n, session) for n, composition in enumerate(compositions)]
            seed += len(rows)
            mine = rows[session.groups.dp.rank() :: session.groups.dp.size()]
            result = train_step(config, session, chunks, optimizer, mine, config.optimizer.lr)
            outcome.losses.append(global_loss(result, session))
            outcome.grad_norms.append(float(result.grad_norm))
            if number == 0 and (replicas == 1 or not config.optimizer.distributed):
                outcome.gradients = _on_host(slices_of([chunk.module for chunk in chunks], "main_grad"))
        gather_parameters(chunks)
        outcome.weights = _on_host(slices_of([chunk.module for chunk in chunks]))
        outcome.step = max(int(group["step"]) for group in optimizer.param_groups)
        outcome.calls = calls()
        if save is not None:
            if rank == 0:
                save.mkdir()
            torch.distributed.barrier()
            staged = stage_sharded(save, session, chunks, optimizer, {})
            staged.write()
            staged.finish()
    return outcome


def _calls(config: NaViLConfig) -> Any:
    """Counts the stand-in's calls from now on."""
    if config.runtime.device == "cuda":
        return Counter
    from tests.engine.standin import calls

    calls.CALLS.clear()
    return calls.count


def _on_host(slices: list) -> list:
    return [(*where, values.float().cpu()) for *where, values in slices]


@torch.no_grad()
def forward(rank: int, world_size: int, config: NaViLConfig, composition: Composition) -> dict[str, torch.Tensor]:
    """What the encoder, each decoder layer and the head give for a row, by name."""
    outputs: dict[str, torch.Tensor] = {}
    with start_session(rank, world_size, config) as session:
        (model,) = build_model(config, session.groups, session.device)
        inputs = session.platform.upload(build_model_inputs(row(config, composition, 0)))()
        assert inputs.first_stage is not None
        outputs["vision features"] = model.encode_images(inputs.first_stage).float().cpu()
        for layer in model.decoder.layers:
            layer.register_forward_hook(
                lambda module, _, output: outputs.update({f"layer {module.layer_number}": output[0].float().cpu()})
            )
        outputs["losses"] = model(inputs).float().cpu()
    return outputs


def whole(outcomes: Sequence[Outcome], name: str) -> dict[str, torch.Tensor]:
    """``gradients`` or ``weights`` of all ranks put together."""
    return assemble([part for outcome in outcomes for part in getattr(outcome, name)])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; absolute where nothing is expected."""
    scale = expected.norm()
    return float((found - expected).norm() / (scale if scale > 0 else 1.0))


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float) -> None:
    """Each tensor within a relative L2 distance."""
    assert found.keys() == expected.keys()
    far = {name: distance(found[name], expected[name]) for name in expected}
    assert {name: value for name, value in far.items() if not value <= limit} == {}


def moved(before: Sequence[Outcome], after: Sequence[Outcome]) -> dict[str, torch.Tensor]:
    """What steps changed of each weight."""
    start = whole(before, "weights")
    return {name: weights - start[name] for name, weights in whole(after, "weights").items()}
