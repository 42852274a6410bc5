"""One feed-forward expert per modality becomes several, and the model computes what it did before (upcycling).

Every new expert is a copy of the old one, and a router's weights over the chosen experts sum to 1, so whatever the
router chooses, the sum is the old expert's output. Routers are drawn by a seed: from there on, training tells the
experts apart.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.atomic_folder import new_folder
from navil_megatron.files.checkpoint_folder import read_config, write_config
from navil_megatron.hf.checkpoint.reader import open_checkpoint
from navil_megatron.hf.checkpoint.writer import CheckpointWriter
from navil_megatron.hf.convert import HowToRun, run_jobs
from navil_megatron.hf.hf_parameters import hf_parameters, hf_shapes
from navil_megatron.hf.jobs import Job, summary, total_bytes, with_types
from navil_megatron.hf.llm.start_values import draw
from navil_megatron.hf.transforms import SAME, Tensors
from navil_megatron.hf.verify import require_valid_model


def upcycle_jobs(old: ModelConfig, new: ModelConfig, *, seed: int, dtype: torch.dtype) -> list[Job]:
    """From a checkpoint of ``old``, with one expert per modality, to one of ``new``, which has several.

    ``seed`` decides the routers, and ``dtype`` is their type; everything else keeps its own.
    """
    known = {ours.name: ours for found in hf_parameters(old) for ours, _ in found.slots(old)}
    jobs = []
    for found in hf_parameters(new):
        for slot, _ in found.slots(new):
            if slot.name not in known:
                router = partial(draw, parameter=found.parameter, layer=slot.layer, seed=seed)
                jobs.append(Job((), (slot,), router, dtype))
            elif found.parameter.num_experts:
                repeated = partial(_repeat, times=new.language.num_experts)
                jobs.append(Job((known[slot.name],), (slot,), repeated))
            else:
                jobs.append(Job((slot,), (slot,), partial(SAME.to_hf, model=new)))
    return jobs


def convert_upcycle(
    checkpoint: Path,
    target: Path,
    *,
    num_experts: int,
    experts_per_token: int,
    seed: int = 1234,
    **run: Unpack[HowToRun],
) -> dict[str, Any]:
    """Writes a checkpoint of weights alone, with several experts per modality; gives what was done, ready for JSON.

    Of a run's folder of checkpoints the newest is taken. ``seed`` decides the routers' first weights.

    Raises:
        UserError: The checkpoint is incomplete or has several experts already; nothing is written then.
    """
    old, reader = open_checkpoint(checkpoint)
    source, found = reader.folder, reader.signatures()
    if old.language.num_experts > 1:
        raise UserError(f"{source} has {old.language.num_experts} experts per modality already, expected 1")
    if num_experts < 2:
        raise UserError(f"{num_experts} experts per modality asked for, expected 2 or more")
    language = replace(old.language, num_experts=num_experts, experts_per_token=experts_per_token)
    new, experts = replace(old, language=language), {"num_experts": num_experts, "experts_per_token": experts_per_token}
    require_valid_model(new, "the model asked for")
    dtype = found["decoder.layers.mlp.linear_fc2.text.weight"][1]
    if not isinstance(dtype, torch.dtype):  # open_checkpoint has refused every other type
        raise RuntimeError(f"experts have type {dtype}")
    jobs = with_types(upcycle_jobs(old, new, seed=seed, dtype=dtype), found, None)
    with new_folder(target, total_bytes(jobs)) as partial_folder:
        run_jobs(jobs, reader, CheckpointWriter(partial_folder), **run)
        config = read_config(source)
        config["model"]["language"] |= experts
        write_config(partial_folder, config)
    return {
        "source": str(source),
        "checkpoint": str(target),
        "family": new.language.family,
        **experts,
        "num_hf_tensors": len(hf_shapes(new)),
        **summary(jobs),
        "notes": [],
    }


def _repeat(tensors: Tensors, *, times: int) -> Tensors:
    (tensor,) = tensors
    return (tensor.expand(times, *tensor.shape),)
