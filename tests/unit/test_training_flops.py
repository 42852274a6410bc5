"""The FLOP count against torch's own counter on the real model."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from navil_megatron.blueprint.flops import forward_terms, training_flops
from navil_megatron.models.build import build_model
from navil_megatron.training.batch import build_model_inputs
from tests.oracle import MIXED, SEQ_LENGTH, global_batch, oracle_config
from tests.ranks import run_ranks, start_session

FULL_ROW = ((20, ((4, 4),)), (24, ()), (5, ((2, 4),)))


# As many words as rows: torch counts those behind them too.
WORDS = {"vocab_size": 128}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"language": WORDS},
    "tied": {"language": {**WORDS, "tied_embeddings": True}},
    "composed": {
        "language": {**WORDS, "family": "internlm2", "qk_norm": False, "composed_visual_output_projection": True}
    },
    "windowed": {
        "language": WORDS,
        "vision": {"token_order": "window", "window_size": 4, "full_attention_layers": (1,)},
    },
}


def counted_by_torch(rank: int, world_size: int, model_sections: dict) -> tuple[int, int, int]:
    config = oracle_config(model=model_sections)
    with start_session(rank, world_size, config) as session:
        (model,) = build_model(config, session.groups, session.device)
        (microbatch,) = global_batch(config, (FULL_ROW,))
        assert microbatch.num_tokens == SEQ_LENGTH, "padding would be counted by torch and not by us"
        inputs = build_model_inputs(microbatch)
        # Of the attention kernels torch's counter knows the products alone, in every version.
        counting = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counting as counter, torch.no_grad():
            model(inputs)
        language, vision = config.model.language, config.model.vision
        # torch counts attention without the causal mask; ours counts the half that is computed.
        causal = sum(length**2 for length in microbatch.sample_lengths)
        masked = 2 * language.num_layers * causal * language.num_attention_heads * language.head_dim
        ours = sum(flops for _, flops in forward_terms(config.model, microbatch.workload))
        assert vision.num_layers > 0
        return counter.get_total_flops(), ours, masked


@pytest.mark.parametrize("model", MODELS)
def test_forward_flops_equal_what_torch_counts(model: str) -> None:
    ((counted, ours, masked),) = run_ranks(1, counted_by_torch, MODELS[model])
    assert ours + masked == counted


def test_backward_costs_two_forwards_and_one_where_frozen() -> None:
    config = oracle_config()
    (microbatch,) = global_batch(config, (MIXED,))
    forward = sum(flops for _, flops in forward_terms(config.model, microbatch.workload))
    everything = training_flops(config.model, microbatch.workload, "s2")
    frozen_text = training_flops(config.model, microbatch.workload, "s1.1")
    assert everything == 3 * forward
    frozen = ("text attention", "text feed-forward", "output_layer")
    text_terms = [flops for part, flops in forward_terms(config.model, microbatch.workload) if part in frozen]
    assert frozen_text == everything - sum(text_terms)


def test_tokens_of_a_workload_leave_padding_out() -> None:
    config = oracle_config()
    (microbatch,) = global_batch(config, (MIXED,))
    work = microbatch.workload
    # One <img> and its context tokens for each of the three images: 4 + 1, 2 + 1, 6 + 1.
    assert (work.num_tokens, work.visual_tokens) == (microbatch.num_tokens, 15)


def test_several_experts_cost_what_a_token_meets() -> None:
    """Two of four experts a token: one feed-forward network more, and the router."""
    one = oracle_config()
    several = oracle_config(model={"language": {"num_experts": 4, "experts_per_token": 2}})
    (microbatch,) = global_batch(one, (MIXED,))
    costs = [sum(flops for _, flops in forward_terms(config.model, microbatch.workload)) for config in (one, several)]
    language = one.model.language
    more = 3 * language.hidden_size * language.ffn_hidden_size + 4 * language.hidden_size
    assert costs[1] - costs[0] == 2 * microbatch.num_tokens * language.num_layers * more
