"""Planned memory against what the engine really keeps: activations that autograd holds, and quantized weights."""

from typing import Any

import pytest
import torch

from navil_megatron.blueprint.held_parameters import chunk_parameters
from navil_megatron.blueprint.workload import Workload
from navil_megatron.layers.rope import cos_sin, decoder_angles
from navil_megatron.models.build import build_model
from navil_megatron.planner.memory import ActivationModel, quantized_weight_bytes
from navil_megatron.training.batch import build_model_inputs
from tests.engine.host import run_rehearsed
from tests.engine.runs import ENGINE, MIXED, row, run_config
from tests.held_memory import watching
from tests.oracle import merge_sections
from tests.ranks import start_session
from tests.tolerances import ACTIVATION_BYTES

TP2_SP = {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
MLP = {"training": {"recompute": "selective", "recompute_modules": ("mlp",)}}


def kept(rank: int, world_size: int, config: Any) -> dict[str, tuple[int, int]]:
    """Bytes (held, planned) of the decoder's activations, and of its weights in FP8."""
    with start_session(rank, world_size, config) as session:
        (model,) = build_model(config, session.groups, session.device)
        microbatch = row(config, MIXED, 0, session)
        inputs = build_model_inputs(microbatch)
        assert inputs.first_stage is not None
        hidden_states = model.embed(inputs.first_stage).detach().clone().requires_grad_()
        rotary = cos_sin(decoder_angles(inputs.position_ids, config.model.language))
        model.set_is_first_microbatch()
        with watching(list(model.parameters())) as held:
            model.decoder(hidden_states, None, rotary_pos_emb=rotary, packed_seq_params=inputs.packed_seq_params)
        weights = 0
        for module in model.modules():
            for weight in getattr(module, "_fp8_workspaces", {}).values():
                tensors = weight.get_metadata().values()
                weights += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.dtype == torch.uint8)
    visual = int(microbatch.visual_token_mask.sum())
    work = Workload(
        text_tokens=microbatch.input_ids.size - visual,
        visual_tokens=visual,
        segment_lengths=microbatch.segment_lengths,
        grids=microbatch.workload.grids,
        num_predictions=int((microbatch.labels != -100).sum()),
    )
    planned = ActivationModel(config, work, fused=True)
    activations = config.model.language.num_layers * planned.layer() + planned.shared_by_layers() + planned.final_norm()
    pieces = list(chunk_parameters(config.model, config.parallel, 0))
    return {
        "activations": (held.num_bytes, activations),
        "weights": (weights, quantized_weight_bytes(config, pieces)),
    }


@pytest.mark.parametrize(
    "sections", [{}, TP2_SP, merge_sections(TP2_SP, MLP)], ids=["one rank", "tp2-sp", "tp2-sp, selective"]
)
def test_the_plan_knows_what_the_engine_keeps(sections: dict) -> None:
    found = {}
    for fp8 in ("none", "delayed", "tensorwise", "blockwise"):
        config = run_config("cpu", **merge_sections(merge_sections(ENGINE, sections), {"precision": {"fp8": fp8}}))
        found[fp8] = run_rehearsed(config.parallel.model_parallel_size, kept, config)[0]
    wrong = {
        f"{fp8} {part}": pair
        for fp8, parts in found.items()
        for part, pair in parts.items()
        if abs(pair[0] - pair[1]) > ACTIVATION_BYTES * pair[0]
    }
    assert wrong == {}
    assert found["tensorwise"]["activations"][0] < 0.95 * found["none"]["activations"][0]
    assert found["none"]["weights"] == (0, 0) < found["tensorwise"]["weights"]
