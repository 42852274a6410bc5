"""What a record says of a run is the same at every layout, and what plain torch makes of one rank's tensors."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

from navil_megatron.blueprint.parameters import parameter_of
from navil_megatron.config.data import SourceConfig
from navil_megatron.config.modality import MODALITIES
from navil_megatron.data.loader import StepData
from navil_megatron.data.loss_groups import groups_of
from navil_megatron.data.types import Microbatch, SampleId
from navil_megatron.models.build import build_model
from navil_megatron.training.grad_norms import PARTS, part_of
from navil_megatron.training.metrics import StepMeter
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.state import TrainingState
from navil_megatron.training.step import evaluate_step, train_step
from tests.oracle import IMAGE_ONLY, MIXED, TEXT_ONLY, TINY_IMAGE, global_batch, merge_sections, oracle_config
from tests.ranks import run_ranks, start_session
from tests.tolerances import RANKS

BATCH = (MIXED, TEXT_ONLY, IMAGE_ONLY, TINY_IMAGE)
SOURCES = (SourceConfig(index="photos/train.idx"), SourceConfig(index="books/train.idx"))
WATCHED = {"data": {"train_sources": SOURCES}, "logging": {"feature_scale_every_steps": 2}}
SP = {"tp": 2, "sequence_parallel": True}
NOT_SPLIT = {"optimizer": {"distributed": False}}
FULL = {"training": {"recompute": "full"}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2-distributed-optimizer": (2, {}),
    "tp2-dp2-distributed-optimizer": (4, {"parallel": {"tp": 2}}),
    "tp2-sp-pp2-interleaved": (4, {"parallel": {**SP, "pp": 2, "vpp": 2}, **FULL}),
    "pp2-uneven-dp2": (4, {"parallel": {"pp": 2, "pipeline_layers": (1, 3)}, **NOT_SPLIT}),
    "cp2-pp2": (4, {"parallel": {"cp": 2, "pp": 2}, **NOT_SPLIT}),
    "cp2-ep2-dp2-distributed-optimizer": (4, {"parallel": {"cp": 2, "ep": 2}}),
    "ep2-tp2-sp": (4, {"parallel": {**SP, "ep": 2}, **NOT_SPLIT}),
}
SAME = ("loss", "grad_norm", "visual_share")
"""What the names of the numbers that must not depend on the layout begin with."""


def rows_of_two_sources(config, session) -> list[Microbatch]:
    """Every row but the second has samples of both."""
    rows = [
        dataclasses.replace(row, samples=tuple(SampleId((n + place) % 2, n) for n in range(len(row.samples))))
        for place, row in enumerate(global_batch(config, BATCH, session))
    ]
    return [dataclasses.replace(row, loss_groups=groups_of(row)) for row in rows]


def watched(rank: int, world_size: int, sections: dict) -> tuple[dict, dict]:
    """The records of two steps, the second of them with a measurement."""
    config = oracle_config(**merge_sections(WATCHED, sections))
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model)
        optimizer = build_optimizer(config, chunks, session)
        state = TrainingState()
        meter = StepMeter(config, session, model, optimizer, state)
        rows = rows_of_two_sources(config, session)
        share = len(rows) // session.groups.dp.size()
        mine = rows[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
        for state.step in (0, 1):
            result = train_step(config, session, chunks, optimizer, mine, lr=0.0)
            meter.add(result, mine, StepData(tuple(mine), 1.0, 0), 0, 0.0)
        for chunk in chunks:
            chunk.eval()
        evaluate_step(config, session, chunks, mine)
        record, scales = meter.record(0.0)
        assert not meter.feature_scale.take().any()
        return record, scales


@functools.cache
def one_rank() -> tuple[dict, dict]:
    (found,) = run_ranks(1, watched, {})
    return found


def numbers(record: dict) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith(SAME)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_of_a_layout_equal_one_ranks(layout: str) -> None:
    world_size, sections = LAYOUTS[layout]
    expected, expected_scales = one_rank()
    for record, scales in run_ranks(world_size, watched, sections):
        assert numbers(record) == pytest.approx(numbers(expected), rel=RANKS["rtol"], abs=RANKS["atol"])
        assert scales == pytest.approx(expected_scales, rel=RANKS["rtol"], abs=RANKS["atol"])


def plain(rank: int, world_size: int) -> tuple[dict, dict]:
    """The same numbers by other ways: samples of one kind alone, gradients by name without clipping, captured tensors
    and masks in causal order.
    """
    config = oracle_config(**merge_sections(WATCHED, {"optimizer": {"clip_grad": None}}))
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model)
        optimizer = build_optimizer(config, chunks, session)
        rows = rows_of_two_sources(config, session)
        seen: list[list[torch.Tensor]] = [[] for _ in range(config.model.language.num_layers + 1)]
        layers = model[0].decoder.layers

        def note(place: int, states: torch.Tensor) -> None:
            seen[place].append(states)

        hooks = [
            layers[0].register_forward_pre_hook(lambda *a: note(0, a[2]["hidden_states"]), with_kwargs=True),
            *(layer.register_forward_hook(lambda *a, n=n: note(n, a[2][0])) for n, layer in enumerate(layers, 1)),
        ]
        train_step(config, session, chunks, optimizer, rows, lr=0.0)
        for hook in hooks:
            hook.remove()
        record: dict[str, float] = {}
        squares = dict.fromkeys(PARTS, 0.0)
        for name, parameter in model[0].named_parameters():
            squares[part_of(parameter_of(config.model, name))] += float(parameter.main_grad.double().square().sum())
        record |= {f"grad_norm/{part}": square**0.5 for part, square in squares.items()}
        record["grad_norm"] = sum(squares.values()) ** 0.5
        kinds = {"loss": lambda s, images: True}
        kinds["loss_text_only"], kinds["loss_with_images"] = lambda s, images: not images, lambda s, images: images
        kinds["loss/photos/train"], kinds["loss/books/train"] = lambda s, images: s == 0, lambda s, images: s == 1
        for name, wanted in kinds.items():
            result = evaluate_step(config, session, chunks, [only(row, wanted) for row in rows])
            record[name] = float(result.loss_sum / result.loss_weight)
        tokens = sum(row.num_tokens for row in rows)
        record["visual_share"] = sum(int((row.visual_token_mask & row.sample_tokens).sum()) for row in rows) / tokens
        return record, plain_scales(rows, seen)


def only(row: Microbatch, wanted) -> Microbatch:
    """The row with loss on some of its samples."""
    weights = np.zeros_like(row.loss_weights)
    for sample, start, length in zip(row.samples, row.sample_starts, row.sample_lengths, strict=True):
        tokens = slice(start, start + length)
        if wanted(sample.source, bool(row.visual_token_mask[tokens].any())):
            weights[tokens] = row.loss_weights[tokens]
    return dataclasses.replace(row, loss_weights=weights)


def plain_scales(rows: list[Microbatch], seen: list[list[torch.Tensor]]) -> dict[str, float]:
    found = {}
    orders = [row.modality_order.rows for row in rows]
    for modality, is_visual in zip(MODALITIES, (False, True), strict=True):
        masks = [row.sample_tokens & (row.visual_token_mask == is_visual) for row in rows]
        chosen = [torch.from_numpy(mask[order]) for mask, order in zip(masks, orders, strict=True)]
        for layer, states in enumerate(seen):
            tokens = torch.cat([rows[mask, 0] for rows, mask in zip(states, chosen, strict=True)]).double()
            found[f"{modality}/layer_{layer}"] = float(tokens.square().mean().sqrt())
        found[f"{modality}/last_layer_spread"] = float(tokens.abs().mean(1).std(correction=0))
    return found


def test_one_rank_equals_plain_torch() -> None:
    record, scales = one_rank()
    ((expected, expected_scales),) = run_ranks(1, plain)
    assert numbers(record) == pytest.approx(expected, rel=RANKS["rtol"], abs=RANKS["atol"])
    assert scales == pytest.approx(expected_scales, rel=RANKS["rtol"], abs=RANKS["atol"])


def test_bf16_slices_and_copies_have_the_norms_of_the_parts() -> None:
    """In bf16 the gradients hang on FP32 copies: whole ones, and each rank's slices of them."""
    bf16 = {"precision": {"type": "bf16"}}
    split = run_ranks(2, watched, bf16)
    whole = run_ranks(2, watched, merge_sections(bf16, NOT_SPLIT))
    for (record, _), (expected, _) in zip(split, whole, strict=True):
        assert all(record[f"grad_norm/{part}"] > 0 for part in PARTS)
        assert numbers(record) == pytest.approx(numbers(expected), rel=RANKS["rtol"], abs=RANKS["atol"])
