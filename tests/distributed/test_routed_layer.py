"""One layer of several experts per modality: what the exported model computes, plain torch's gradients and balance
losses, the same collectives whatever the rows are, and gradients of experts and modalities without a row.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from navil_megatron.blueprint.modality_order import plan_modality_order
from navil_megatron.blueprint.parameters import parameter_of
from navil_megatron.config.modality import MODALITIES
from navil_megatron.hf.remote_code.modeling_language_ve import ExpertsVE, SplitVEMLP
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.modality import NaViLPackedSeqParams, build_packed_seq_params
from navil_megatron.layers.modality_experts import ModalityExperts
from navil_megatron.models.build import random_slice
from navil_megatron.models.mcore_config import build_transformer_config
from tests.oracle import merge_sections, oracle_config
from tests.ranks import run_ranks, start_session
from tests.tolerances import GOLDEN_GRADIENT, RANKS
from tools.bench.traffic_count import CountTraffic

ROUTED: dict[str, Any] = {
    "model": {"language": {"num_experts": 4, "experts_per_token": 2}},
    "training": {"router_aux_loss": 0.5, "router_z_loss": 0.1},
}
TOP_1 = merge_sections(ROUTED, {"model": {"language": {"num_experts": 4, "experts_per_token": 1}}})
SP = {"tp": 2, "sequence_parallel": True}
ROWS, NUM_TEXT, PADDED = 24, 10, (0, 1, 20)
SCALES = (2.0, 3.0)


def _plan(num_text: int = NUM_TEXT) -> NaViLPackedSeqParams:
    """Causal order is modality-major here; some rows are padding."""
    sample = ~np.isin(np.arange(ROWS), PADDED)
    order = plan_modality_order(np.arange(ROWS) >= num_text, [ROWS], sample_tokens=sample)
    return build_packed_seq_params(order)


def _start_layer(config: Any, session: Any) -> tuple[ModalityExperts, Tensor]:
    layer = ModalityExperts(build_transformer_config(config), session.groups, TORCH_KERNELS)
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(ROWS, 1, config.model.language.hidden_size, generator=generator)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return layer, rows.requires_grad_()


def _weights(layer: ModalityExperts, modality: str) -> tuple[torch.nn.Parameter, ...]:
    """Router, [gate; up] and down of one modality."""
    modules = (layer.router, layer.linear_fc1, layer.linear_fc2)
    return tuple(module.get_parameter(f"{modality}.weight") for module in modules)


def _exported_layer(layer: ModalityExperts, modality: str, language: Any) -> ExpertsVE:
    """The same weights in the class that exported folders carry."""
    sizes = SimpleNamespace(
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_experts=language.num_experts,
        num_experts_per_tok=language.experts_per_token,
    )
    plain = ExpertsVE(sizes, SplitVEMLP)  # type: ignore[arg-type]
    router, fc1, fc2 = _weights(layer, modality)
    state = {"gate.weight": router}
    for number, (gate_up, down) in enumerate(zip(fc1, fc2, strict=True)):
        matrices = zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True)
        state |= {f"experts.{number}.{name}.weight": matrix for name, matrix in matrices}
    plain.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, strict=True)
    return plain


def _against_export(rank: int, world_size: int, sections: dict) -> None:
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        layer, rows = _start_layer(config, session)
        output = layer(rows, _plan())
        output.square().sum().backward()
        again = rows.detach().requires_grad_()
        plain = {modality: _exported_layer(layer, modality, config.model.language) for modality in MODALITIES}
        expected = torch.cat([plain["text"](again[:NUM_TEXT]), plain["visual"](again[NUM_TEXT:])])
        expected.square().sum().backward()
        torch.testing.assert_close(output, expected, **RANKS)
        learned = config.model.language.experts_per_token > 1
        for modality, experts in plain.items():
            router, _, down = _weights(layer, modality)
            whole = torch.stack([expert.down_proj.weight.grad for expert in experts.experts])  # type: ignore[misc]
            torch.testing.assert_close(down.grad, whole, **GOLDEN_GRADIENT)
            if learned:
                torch.testing.assert_close(router.grad, experts.gate.weight.grad, **GOLDEN_GRADIENT)
        if learned:
            torch.testing.assert_close(rows.grad, again.grad, **GOLDEN_GRADIENT)


@pytest.mark.parametrize("sections", [ROUTED, TOP_1])
def test_layer_computes_what_the_exported_model_does(sections: dict) -> None:
    run_ranks(1, _against_export, sections)


def _every_expert(rows: Tensor, router: Tensor, fc1: Tensor, fc2: Tensor, times: int) -> Tensor:
    """Plain torch: all experts on all rows [r, h], and a mask. The score of a single choice is divided by itself."""
    scores = (rows @ router.t()).softmax(-1)
    kept = torch.zeros_like(scores).scatter(1, scores.topk(times).indices, 1.0) * scores
    total = kept.sum(-1, keepdim=True)
    weights = kept / (total.detach() if times == 1 else total)
    gate, up = torch.einsum("rh,eoh->reo", rows, fc1).chunk(2, dim=-1)
    return torch.einsum("reo,eho,re->rh", silu(gate) * up, fc2, weights)


def _against_plain_torch(rank: int, world_size: int, sections: dict) -> None:
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        layer, rows = _start_layer(config, session)
        target = torch.randn(rows.shape, generator=torch.Generator().manual_seed(6))
        (layer(rows, _plan()) * target).sum().backward()
        again = rows.detach().squeeze(1).requires_grad_()
        parts = again.split([NUM_TEXT, ROWS - NUM_TEXT])
        copies = [[w.detach().requires_grad_() for w in _weights(layer, modality)] for modality in MODALITIES]
        times = config.model.language.experts_per_token
        expected = torch.cat([_every_expert(part, *held, times) for part, held in zip(parts, copies, strict=True)])
        (expected * target.squeeze(1)).sum().backward()
        torch.testing.assert_close(rows.grad.squeeze(1), again.grad, **GOLDEN_GRADIENT)  # type: ignore[union-attr]
        for modality, held in zip(MODALITIES, copies, strict=True):
            for found, plain in zip(_weights(layer, modality), held, strict=True):
                assert found.grad is not None and found.grad.abs().max() > 0
                torch.testing.assert_close(found.grad, plain.grad, **GOLDEN_GRADIENT)


@pytest.mark.parametrize("sections", [ROUTED, TOP_1])
def test_gradients_are_those_of_plain_torch(sections: dict) -> None:
    """The router's too: with one expert a token its weight is 1, and still the prediction loss reaches the router."""
    run_ranks(1, _against_plain_torch, sections)


def _plain_balance_losses(rows: Tensor, gates: list[Tensor]) -> tuple[Tensor, list[list[float]]]:
    """Of the rows that are no padding: both losses, weighed, and tokens, entropy, and each loss of both modalities."""
    total, measured = torch.zeros(()), []
    bounds = ((0, NUM_TEXT), (NUM_TEXT, ROWS))
    for (first, last), gate, scale in zip(bounds, gates, SCALES, strict=True):
        kept = [row for row in range(first, last) if row not in PADDED]
        logits = rows[kept] @ gate.t()
        scores = logits.softmax(-1)
        chosen = scores.topk(2).indices.flatten().bincount(minlength=4)
        even = 4 * (chosen / chosen.sum() * scores.mean(0)).sum()
        smallness = logits.logsumexp(-1).square().mean()
        total = total + scale * len(kept) * (0.5 * even + 0.1 * smallness)
        entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
        measured.append([len(kept), float(entropy), len(kept) * float(even), len(kept) * float(smallness)])
    return total, measured


def _balance_losses(rank: int, world_size: int) -> None:
    config = oracle_config(**ROUTED)
    with start_session(rank, world_size, config) as session:
        layer, rows = _start_layer(config, session)
        plan = _plan()
        plan.router_loss_scale = torch.tensor(SCALES)
        (layer(rows, plan) * 0).sum().backward()
        again = rows.detach().squeeze(1).requires_grad_()
        gates = [_weights(layer, modality)[0].detach().requires_grad_() for modality in MODALITIES]
        total, measured = _plain_balance_losses(again, gates)
        total.backward()
        torch.testing.assert_close(rows.grad.squeeze(1), again.grad, **RANKS)  # type: ignore[union-attr]
        for modality, gate in zip(MODALITIES, gates, strict=True):
            torch.testing.assert_close(_weights(layer, modality)[0].grad, gate.grad, **RANKS)
        torch.testing.assert_close(layer.router.get_buffer("sums"), torch.tensor(measured), **RANKS)


def test_balance_losses_are_those_of_plain_torch_without_padding() -> None:
    run_ranks(1, _balance_losses)


def _collectives(rank: int, world_size: int, parallel: dict) -> list[dict]:
    """Calls of forward and backward for rows of both modalities, of text alone and of images alone."""
    config = oracle_config(**merge_sections(ROUTED, {"parallel": parallel}))
    found = []
    with start_session(rank, world_size, config) as session:
        layer, rows = _start_layer(config, session)
        mine = rows.detach().chunk(session.groups.tp.size())[session.groups.tp.rank()].requires_grad_()
        for num_text in (NUM_TEXT, ROWS, 0):
            plan = _plan(num_text)
            plan.router_loss_scale = torch.tensor(SCALES)
            layer.zero_grad()
            with CountTraffic(session.groups) as counting:
                layer(mine, plan).square().sum().backward()
            found.append({key: traffic.calls for key, traffic in counting.found.items()})
            for name, parameter in layer.named_parameters():
                assert parameter.grad is not None, name
                if (num_text == ROWS and ".visual." in name) or (num_text == 0 and ".text." in name):
                    assert not parameter.grad.any(), name
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel"), [(1, {}), (2, SP), (2, {**SP, "etp": 1}), (2, {"ep": 2}), (4, {"ep": 2, **SP})]
)
def test_collectives_do_not_depend_on_the_rows(world_size: int, parallel: dict) -> None:
    """And a modality without a row, with all its experts and its router, has zero gradients, not none."""
    for mixed, text, visual in run_ranks(world_size, _collectives, parallel):
        assert mixed == text == visual
        assert bool(mixed) == (world_size > 1)


def _one_expert_for_all(rank: int, world_size: int) -> None:
    config = oracle_config(**ROUTED)
    with start_session(rank, world_size, config) as session:
        layer, rows = _start_layer(config, session)
        for modality in MODALITIES:
            _weights(layer, modality)[0].data.zero_()  # all scores are equal: everyone's choice is the same
        layer(rows, _plan()).square().sum().backward()
        for modality in MODALITIES:
            for matrix in _weights(layer, modality)[1:]:
                assert matrix.grad is not None
                assert sum(bool(of_expert.any()) for of_expert in matrix.grad) == 2


def test_an_expert_without_a_token_has_zero_gradients() -> None:
    run_ranks(1, _one_expert_for_all)


def _output_of_whole_weights(rank: int, world_size: int, parallel: dict) -> tuple[Tensor, Tensor]:
    """Of this rank's rows: the output and the gradient of the rows, with weights that are the same at every layout."""
    config = oracle_config(**merge_sections(ROUTED, {"parallel": parallel}))
    with start_session(rank, world_size, config) as session:
        layer, rows = _start_layer(config, session)
        for name, parameter in layer.named_parameters():
            row = dataclasses.replace(parameter_of(config.model, f"decoder.layers.0.mlp.{name}"), std=0.1)
            parameter.data.copy_(random_slice(row, name, 5, session.groups, parameter.device))
        mine = rows.detach().chunk(session.groups.tp.size())[session.groups.tp.rank()].requires_grad_()
        output = layer(mine, _plan())
        output.sum().backward()
        assert mine.grad is not None
        return output.detach(), mine.grad


@pytest.mark.parametrize("parallel", [{"etp": 4}, {"etp": 2}, {"etp": 1}, {"ep": 2, "etp": 2}], ids=str)
def test_experts_split_over_some_of_the_tensor_parallel_ranks(parallel: dict) -> None:
    expected = run_ranks(1, _output_of_whole_weights, {})[0]
    found = run_ranks(4, _output_of_whole_weights, {"tp": 4, "sequence_parallel": True, **parallel})
    for whole, parts in zip(expected, zip(*found, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, **RANKS)
