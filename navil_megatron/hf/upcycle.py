"""One feed-forward expert per modality becomes several, and the model computes what it did before (upcycling).

Every new expert is a copy of the old one, and a router's weights over the chosen experts sum to 1, so whatever the
router chooses, the sum is the old expert's output. Routers are drawn by a seed: from there on, training tells the
experts apart.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from navil_megatron.blueprint.parameters import parameters_by_key
from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.atomic_folder import new_folder, require_new
from navil_megatron.files.checkpoint_folder import find_checkpoint, read_config, write_config
from navil_megatron.files.worker_pool import OnProgress
from navil_megatron.hf.checkpoint.reader import CheckpointReader
from navil_megatron.hf.checkpoint.writer import CheckpointWriter
from navil_megatron.hf.convert import run_steps, targets, total_bytes, with_types
from navil_megatron.hf.llm.start_values import draw
from navil_megatron.hf.plan import Step, plan_export
from navil_megatron.hf.transforms import Tensors
from navil_megatron.hf.verify import read_model_config, require_mcore_tensors, require_valid_model, summary


def plan_upcycle(old: ModelConfig, new: ModelConfig, *, seed: int, dtype: torch.dtype) -> list[Step]:
    """The steps from a checkpoint of ``old`` to one of ``new``, which differs in its experts alone.

    Args:
        old: One expert per modality.
        new: Several.
        seed: Decides the routers.
        dtype: Type of the routers; everything else keeps its own.
    """
    known = {slot.name: slot for step in plan_export(old) for slot in step.sources}
    steps = []
    for (slot,) in (step.sources for step in plan_export(new)):
        row = parameters_by_key(new)[slot.key]
        if row.num_experts:
            repeated = partial(_repeat, times=new.language.num_experts)
            steps.append(Step((known[slot.name],), (slot,), repeated))
        elif slot.name in known:
            steps.append(Step((slot,), (slot,), _unchanged))
        else:
            router = partial(draw, parameter=row, layer=slot.layer, seed=seed, dtype=dtype)
            steps.append(Step((), (slot,), router, dtype))
    return steps


def convert_upcycle(
    checkpoint: Path,
    target: Path,
    *,
    num_experts: int,
    experts_per_token: int,
    seed: int = 1234,
    verify: bool = True,
    jobs: int = 1,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint with several experts per modality.

    Args:
        checkpoint: A checkpoint folder, or a run's folder of checkpoints (the newest is taken).
        target: The checkpoint folder to make; it holds weights alone.
        num_experts: Experts of each modality.
        experts_per_token: Experts that a token's router chooses.
        seed: Decides the routers' first weights.
        verify: Read everything back and compare.
        jobs: Processes that work at the same time.
        on_progress: Is told the bytes that are done and the bytes in all.

    Returns:
        What was done, ready for JSON.

    Raises:
        UserError: The checkpoint is incomplete or has several experts already; nothing is written then.
    """
    started = time.monotonic()
    require_new(target)
    source = find_checkpoint(checkpoint)
    old = read_model_config(source)
    if old.language.num_experts > 1:
        raise UserError(f"{source} has {old.language.num_experts} experts per modality already, expected 1")
    if num_experts < 2:
        raise UserError(f"{num_experts} experts per modality asked for, expected 2 or more")
    language = dataclasses.replace(old.language, num_experts=num_experts, experts_per_token=experts_per_token)
    new = dataclasses.replace(old, language=language)
    require_valid_model(new, "the model asked for")
    reader = CheckpointReader(source)
    found = reader.signatures()
    require_mcore_tensors(found, old, f"checkpoint {source}")
    dtype = found["decoder.layers.mlp.linear_fc2.text.weight"][1]
    if not isinstance(dtype, torch.dtype):  # require_mcore_tensors has refused every other type
        raise RuntimeError(f"experts have type {dtype}")
    steps = with_types(plan_upcycle(old, new, seed=seed, dtype=dtype), found, None)
    with new_folder(target, total_bytes(steps)) as partial_folder:
        writer = CheckpointWriter(partial_folder, targets(steps))
        run_steps(steps, reader, writer, CheckpointReader, jobs=jobs, verify=verify, on_progress=on_progress)
        written = CheckpointReader(partial_folder).signatures()
        config = read_config(source)
        config["model"]["language"] |= {"num_experts": num_experts, "experts_per_token": experts_per_token}
        write_config(partial_folder, config)
    return {
        "source": str(source),
        "checkpoint": str(target),
        "family": new.language.family,
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
        "num_hf_tensors": sum(len(step.targets) for step in plan_export(new)),
        **summary(written, None),
        "verified": verify,
        "notes": [],
        "seconds": round(time.monotonic() - started, 3),
    }


def _repeat(tensors: Tensors, *, times: int) -> Tensors:
    """[...] -> [times, ...]."""
    (tensor,) = tensors
    return (tensor.expand(times, *tensor.shape),)


def _unchanged(tensors: Tensors) -> Tensors:
    return tensors
