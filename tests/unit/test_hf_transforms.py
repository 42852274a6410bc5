"""Transforms between HF and checkpoint tensors lose nothing and put rows where they belong."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.config.schema import ModelConfig
from navil_megatron.hf.transforms import TRANSFORMS, stack_layers, unstack_layers
from tests.unit.hf_examples import tiny_model

SIZES = st.integers(min_value=1, max_value=4)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    model = tiny_model()
    groups = draw(SIZES)
    language = dataclasses.replace(
        model.language,
        num_query_groups=groups,
        num_attention_heads=groups * draw(SIZES),
        head_dim=2 * draw(SIZES),
        hidden_size=draw(SIZES),
        ffn_hidden_size=draw(SIZES),
    )
    vision = dataclasses.replace(model.vision, patch_size=draw(SIZES), hidden_size=draw(SIZES))
    return dataclasses.replace(model, language=language, vision=vision)


def mcore_shape(name: str, model: ModelConfig) -> tuple[int, ...]:
    language = model.language
    rows = (language.num_attention_heads + 2 * language.num_query_groups) * language.head_dim
    return {
        "same": (3, language.hidden_size),
        "patch_convolution": (model.vision.hidden_size, model.vision.patch_dim),
        "grouped_qkv": (rows, language.hidden_size),
        "gate_up": (2 * language.ffn_hidden_size, language.hidden_size),
    }[name]


@pytest.mark.parametrize("name", TRANSFORMS)
@given(model=models())
@settings(max_examples=50, deadline=None)
def test_inverse_both_ways(name: str, model: ModelConfig) -> None:
    shape = mcore_shape(name, model)
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    parts = TRANSFORMS[name].to_hf(tensor, model)
    assert sum(part.numel() for part in parts) == tensor.numel()
    again = TRANSFORMS[name].to_mcore(parts, model)
    assert torch.equal(again, tensor)
    for part, expected in zip(TRANSFORMS[name].to_hf(again, model), parts, strict=True):
        assert torch.equal(part, expected)


@given(model=models())
@settings(max_examples=50, deadline=None)
def test_grouped_qkv_rows(model: ModelConfig) -> None:
    """Row by row: group 0's queries, key, value, then group 1's."""
    language = model.language
    n, g, d = language.num_attention_heads, language.num_query_groups, language.head_dim
    q, k, v = (
        torch.arange(rows * d, dtype=torch.float32)[:, None] + start for rows, start in ((n, 0), (g, 1e3), (g, 2e3))
    )
    fused = TRANSFORMS["grouped_qkv"].to_mcore((q, k, v), model)
    expected = []
    for group in range(g):
        heads = range(group * (n // g), (group + 1) * (n // g))
        expected += [q[head * d : (head + 1) * d] for head in heads]
        expected += [k[group * d : (group + 1) * d], v[group * d : (group + 1) * d]]
    assert torch.equal(fused, torch.cat(expected))


def test_patch_convolution_is_one_matrix() -> None:
    model = tiny_model()
    weight, patches = (torch.randn(count, 3, 16, 16, dtype=torch.float64) for count in (5, 7))
    matrix = TRANSFORMS["patch_convolution"].to_mcore((weight,), model)
    convolved = torch.nn.functional.conv2d(patches, weight, stride=16).flatten(1)
    torch.testing.assert_close(patches.flatten(1) @ matrix.T, convolved)


def test_layers_stack_on_the_first_axis() -> None:
    layers = [torch.randn(2, 3) for _ in range(4)]
    stacked = stack_layers(layers)
    assert stacked.shape == (4, 2, 3)
    assert all(torch.equal(one, other) for one, other in zip(layers, unstack_layers(stacked), strict=True))
