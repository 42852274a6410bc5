"""The megatron-core model reproduces the authors' encoder, connector, decoder layers, logits, losses and gradients."""

import dataclasses
from pathlib import Path

import pytest
import torch

from navil_megatron.models.build import build_model
from navil_megatron.training.batch import place_of
from tests.golden_cases import GoldenCase
from tests.ranks import run_ranks, start_session, tiny_config
from tests.tolerances import GOLDEN, GOLDEN_GRADIENT
from tests.whole import assemble, load_whole, slices_of

CASES = ["9b_single", "9b_multi", "9b_text", "9b_pack", "2b_single", "2b_multi", "2b_text", "2b_pack"]
WINDOWED = ["2b_win_single", "2b_win_multi"]


def build_case(case: GoldenCase, rank: int, world_size: int, **sections):
    """A session and the case's model on it, with the case's weights."""
    session = start_session(rank, world_size, tiny_config(model=case.model, **sections))
    chunks = build_model(tiny_config(model=case.model, **sections), session.groups, session.device)
    load_whole(chunks, case.whole)
    return session, chunks


def forward_and_backward(rank: int, world_size: int, golden_dir: Path, name: str) -> None:
    case = GoldenCase(golden_dir, name)
    session, (model,) = build_case(case, rank, world_size)
    with session:
        _check_activations(case, model)
        for kind in ("loss", "loss_weighted"):
            if kind in case.expected:
                inputs = case.model_inputs(kind)
                loss = (model(inputs) * inputs.loss_weights).sum() / _denominator(case, kind)
                torch.testing.assert_close(loss.reshape(1), case.expected[kind], **GOLDEN)
        _check_gradients(case, model)


def _denominator(case: GoldenCase, kind: str) -> float:
    return float(case.shifted(kind)[1].sum())


def _check_activations(case: GoldenCase, model) -> None:
    layers: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_hook(lambda *call, key=f"llm.layer.{number}": layers.__setitem__(key, call[-1][0]))
    model.decoder.layers[0].self_attention.register_forward_hook(
        lambda *call: layers.__setitem__("llm.layer.0.attn", call[-1][0])
    )
    model.decoder.final_layernorm.register_forward_hook(lambda *call: layers.__setitem__("llm.final_norm", call[-1]))
    everywhere = case.model_inputs()
    back = _causal_rows(case)
    logits = model(dataclasses.replace(everywhere, labels=None, loss_positions=back))
    torch.testing.assert_close(logits, case.expected["logits"][0], **GOLDEN)
    torch.testing.assert_close(
        model.embed(everywhere.first_stage)[back, 0], case.expected["llm.inputs_embeds"][0], **GOLDEN
    )
    for key, value in layers.items():
        if key in case.expected:
            torch.testing.assert_close(
                value[back, 0], case.expected[key][0], **GOLDEN, msg=lambda m, k=key: f"{k}: {m}"
            )
    if everywhere.first_stage.image_positions.numel():
        features = model.encode_images(everywhere.first_stage)
        torch.testing.assert_close(features, case.expected["mlp1.out"][:, 0], **GOLDEN)


def _causal_rows(case: GoldenCase) -> torch.Tensor:
    """Rows of the modality-major microbatch in causal order."""
    mask = case.inputs["visual_token_mask"][0]
    return torch.argsort(torch.argsort(mask.to(torch.int8), stable=True))


def _check_gradients(case: GoldenCase, model) -> None:
    expected = case.expected_gradients()
    if not expected:
        return
    kind = "loss_weighted" if "pack" in case.meta["case"] or "three samples" in case.meta["case"] else "loss"
    inputs = case.model_inputs(kind)
    ((model(inputs) * inputs.loss_weights).sum() / _denominator(case, kind)).backward()
    found = assemble(slices_of([model], "grad"))
    for key, gradient in expected.items():
        name, _, layer = key.partition("[")
        value = found[name][int(layer[:-1])] if layer else found[name]
        torch.testing.assert_close(value, gradient, **GOLDEN_GRADIENT, msg=lambda m, k=key: f"{k}: {m}")
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", CASES + WINDOWED)
def test_one_rank_equals_the_authors_code(golden_dir: Path, name: str) -> None:
    run_ranks(1, forward_and_backward, golden_dir, name)


def encoder_variants(rank: int, world_size: int, golden_dir: Path, name: str) -> None:
    case = GoldenCase(golden_dir, name)
    for variant in case.meta["variants"]:
        full = variant["fullatt_block_indexes"]
        vision = dataclasses.replace(
            case.model.vision,
            window_size=variant["window_size"],
            full_attention_layers=None if full is None else tuple(full),
        )
        case.model = dataclasses.replace(case.model, vision=vision)
        session, (model,) = build_case(case, rank, world_size, parallel={"tp": world_size})
        with session:
            features = model.encode_images(case.image_inputs(place_of(session)))
        torch.testing.assert_close(features, case.expected[f"{variant['name']}/mlp1.out"][:, 0], **GOLDEN)


@pytest.mark.parametrize(
    # 2b_win has one key/value head, which two ranks cannot share.
    ("name", "world_size"),
    [("2b_vit_variants", 1), ("2b_vit_variants", 2), ("2b_win_vit_variants", 1)],
)
def test_encoder_windows_frames_and_full_layers(golden_dir: Path, name: str, world_size: int) -> None:
    run_ranks(world_size, encoder_variants, golden_dir, name)


@pytest.mark.parametrize("name", ["9b_multi", "2b_multi", "9b_text", "2b_pack"])
def test_tensor_and_sequence_parallel_equal_the_authors_code(golden_dir: Path, name: str) -> None:
    """Two ranks at the golden tolerance: the head-split attention, the split images, the composed projection."""
    run_ranks(2, forward_at_tensor_parallel_2, golden_dir, name)


def forward_at_tensor_parallel_2(rank: int, world_size: int, golden_dir: Path, name: str) -> None:
    case = GoldenCase(golden_dir, name)
    split = {"tp": 2, "sequence_parallel": case.inputs["input_ids"].numel() % 2 == 0}
    session, (model,) = build_case(case, rank, world_size, parallel=split)
    with session:
        inputs = case.model_inputs("loss", place_of(session))
        loss = (model(inputs) * inputs.loss_weights).sum() / _denominator(case, "loss")
        torch.testing.assert_close(loss.reshape(1), case.expected["loss"], **GOLDEN)
