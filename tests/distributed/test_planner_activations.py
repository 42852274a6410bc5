"""Planned activation memory against the storages that autograd really holds: by part, and of the whole model."""

from typing import Any

import pytest

from navil_megatron.blueprint.workload import Workload
from navil_megatron.layers.rope import cos_sin, decoder_angles
from navil_megatron.models.build import build_model
from navil_megatron.planner.memory import ActivationModel
from navil_megatron.training.batch import build_model_inputs
from tests.held_memory import watching
from tests.oracle import MIXED, global_batch, oracle_config
from tests.ranks import run_ranks, start_session
from tests.tolerances import ACTIVATION_BYTES

FULL = {"training": {"recompute": "full"}}
SELECTIVE = {"training": {"recompute": "selective"}}
COMPOSED = {"language": {"family": "internlm2", "qk_norm": False, "composed_visual_output_projection": True}}
WINDOWS = {"vision": {"norm": "layernorm", "token_order": "window", "window_size": 4, "full_attention_layers": (1,)}}
EXPERTS = {"language": {"num_experts": 4, "experts_per_token": 2}}
TP2_SP = {"parallel": {"tp": 2, "sequence_parallel": True}}

CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "none": {},
        "selective": SELECTIVE,
        "full": FULL,
        "composed": {"model": COMPOSED},
        "composed, selective": {"model": COMPOSED, **SELECTIVE},
        "windows": {"model": WINDOWS},
        "windows, full": {"model": WINDOWS, **FULL},
        "experts": {"model": EXPERTS},
        "experts, full": {"model": EXPERTS, **FULL},
    },
    2: {
        "tp2": {"parallel": {"tp": 2}},
        "tp2-sp": TP2_SP,
        "tp2-sp, selective": {**TP2_SP, **SELECTIVE},
        "tp2-sp, full": {**TP2_SP, **FULL},
        "tp2-sp, composed": {**TP2_SP, "model": COMPOSED},
        "ep2": {"parallel": {"ep": 2}},
        "tp2-sp, experts": {**TP2_SP, "model": EXPERTS},
        "cp2": {"parallel": {"cp": 2}},
        "cp2, selective": {"parallel": {"cp": 2}, **SELECTIVE},
        "cp2, full": {"parallel": {"cp": 2}, **FULL},
    },
}
"""Ranks -> name -> sections of the config."""


def held(rank: int, world_size: int, cases: dict[str, dict]) -> dict[str, dict[str, tuple[int, int]]]:
    """For each case and part (bytes held, bytes planned)."""
    return {name: held_by_parts(rank, world_size, sections) for name, sections in cases.items()}


def held_by_parts(rank: int, world_size: int, sections: dict) -> dict[str, tuple[int, int]]:
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        (model,) = build_model(config, session.groups, session.device)
        (row,) = global_batch(config, (MIXED,), session)
        inputs = build_model_inputs(row)
        assert inputs.first_stage is not None
        parameters = list(model.parameters())
        with watching(parameters) as encoder:
            model.encode_images(inputs.first_stage)
        hidden_states = model.embed(inputs.first_stage).detach().clone().requires_grad_()
        rotary = cos_sin(decoder_angles(inputs.position_ids, config.model.language))
        with watching(parameters) as decoder:
            output = model.decoder(
                hidden_states=hidden_states,
                attention_mask=None,
                rotary_pos_emb=rotary,
                packed_seq_params=inputs.packed_seq_params,
            )
        with watching(parameters) as head:
            model.predict(output.detach().requires_grad_(), inputs)
        with watching(parameters) as whole:
            model(inputs)
    # The plan is of what is computed, padding included.
    visual = int(row.visual_token_mask.sum())
    work = Workload(
        text_tokens=row.input_ids.size - visual,
        visual_tokens=visual,
        segment_lengths=row.segment_lengths,
        grids=row.workload.grids,
        num_predictions=int((row.labels != -100).sum()),
    )
    planned = ActivationModel(config, work, fused=False)
    num_layers = config.model.language.num_layers
    layers = num_layers * planned.layer() + planned.shared_by_layers() + planned.final_norm()
    parts = {
        "encoder": (encoder.num_bytes, planned.encoder()),
        "decoder": (decoder.num_bytes, layers),
        "head": (head.num_bytes, planned.head()),
    }
    total = planned.embedding() + sum(of_part for _, of_part in parts.values())
    return {**parts, "whole": (whole.num_bytes, total)}


@pytest.mark.parametrize("num_ranks", CASES)
def test_planned_activations_are_what_autograd_holds(num_ranks: int) -> None:
    ranks = run_ranks(num_ranks, held, CASES[num_ranks])
    wrong = []
    for name in CASES[num_ranks]:
        for part in ("encoder", "decoder", "head", "whole"):
            found, planned = max(rank[name][part] for rank in ranks)  # of the fullest rank
            if abs(planned - found) > ACTIVATION_BYTES * found:
                wrong.append(f"{name}, {part}: held {found:,}, planned {planned:,}")
    assert wrong == []
