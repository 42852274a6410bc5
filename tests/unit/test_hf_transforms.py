"""Transforms between HF and checkpoint tensors lose nothing and put rows where they belong."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.config.language import FAMILIES
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf import transforms
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.hf_parameters import hf_parameters
from navil_megatron.hf.ingest import convert_from_hf
from navil_megatron.hf.transforms import GROUPED_QKV, PATCH_CONVOLUTION, Transform
from tests.unit.hf_examples import tiny_model, write_checkpoint
from tests.whole_checkpoint import read_tensors

TRANSFORMS = {name: value for name, value in vars(transforms).items() if isinstance(value, Transform)}
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


Shapes = list[tuple[int, ...]]


def hf_shapes(name: str, model: ModelConfig, bias: bool) -> Shapes:
    """What the Hugging Face side of a transform holds; a bias is a matrix without columns."""
    language, vision = model.language, model.vision
    n, g, d = language.num_attention_heads, language.num_query_groups, language.head_dim
    columns = () if bias else (language.hidden_size,)
    return {
        "SAME": [(3, *columns)],
        "PATCH_CONVOLUTION": [(vision.hidden_size, 3, vision.patch_size, vision.patch_size)],
        "GROUPED_QKV": [(n * d, *columns), (g * d, *columns), (g * d, *columns)],
        "GATE_UP": [(language.ffn_hidden_size, *columns)] * 2,
        "EXPERTS": [(language.ffn_hidden_size, *columns)] * 3,
        "EXPERTS_GATE_UP": [(language.ffn_hidden_size, *columns)] * 6,
    }[name]


def numbered(shapes: Shapes, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Every element another bit pattern, as far as the type has them."""
    sizes = [math.prod(shape) for shape in shapes]
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    flat = torch.arange(sum(sizes), dtype=bits).view(dtype)
    return tuple(part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))


def same_bits(ones: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[ones[0].dtype.itemsize]
    return all(
        one.dtype == other.dtype and torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))
        for one, other in zip(ones, others, strict=True)
    )


@pytest.mark.parametrize("name", TRANSFORMS)
@given(model=models(), bias=st.booleans(), dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
@settings(max_examples=200, deadline=None)
def test_inverse_both_ways(name: str, model: ModelConfig, bias: bool, dtype: torch.dtype) -> None:
    """From the files to the checkpoint and back, and the other way round, bit for bit."""
    transform = TRANSFORMS[name]
    parts = numbered(hf_shapes(name, model, bias), dtype)
    (tensor,) = transform.to_mcore(parts, model)
    assert tensor.numel() == sum(part.numel() for part in parts)
    assert same_bits(transform.to_hf((tensor,), model), parts)
    renumbered = numbered([tuple(tensor.shape)], dtype)
    assert same_bits(transform.to_mcore(transform.to_hf(renumbered, model), model), renumbered)


@pytest.mark.parametrize("family", FAMILIES)
@given(sizes=models(), layout=st.booleans())
@settings(max_examples=50, deadline=None)
def test_every_parameter_of_every_family_inverts(family: str, sizes: ModelConfig, layout: bool) -> None:
    """The shapes that the table derives fit its transforms, whatever the sizes."""
    model = of_family(family, sizes, layout)
    for found in hf_parameters(model):
        ours, theirs = next(iter(found.slots(model)))
        parts = numbered([slot.shape for slot in theirs], torch.float32)
        (tensor,) = found.transform.to_mcore(parts, model)
        assert tuple(tensor.shape) == ours.shape, ours.key
        assert same_bits(found.transform.to_hf((tensor,), model), parts), ours.key


def of_family(family: str, sizes: ModelConfig, layout: bool) -> ModelConfig:
    """The sizes of one model in the layout of a family, with either choice of what is optional."""
    traits = FAMILIES[family]
    language = dataclasses.replace(
        sizes.language,
        family=family,
        **traits.fixed,
        tied_embeddings=layout,
        composed_visual_output_projection=layout and traits.may_compose_visual_output,
    )
    vision = dataclasses.replace(sizes.vision, qkv_bias=layout, norm="layernorm" if layout else "rmsnorm")
    return dataclasses.replace(sizes, language=language, vision=vision)


@given(model=models())
@settings(max_examples=50, deadline=None)
def test_grouped_qkv_rows(model: ModelConfig) -> None:
    """Row by row: group 0's queries, key, value, then group 1's."""
    language = model.language
    n, g, d = language.num_attention_heads, language.num_query_groups, language.head_dim
    q, k, v = (
        torch.arange(rows * d, dtype=torch.float32)[:, None] + start for rows, start in ((n, 0), (g, 1e3), (g, 2e3))
    )
    (fused,) = GROUPED_QKV.to_mcore((q, k, v), model)
    expected = []
    for group in range(g):
        heads = range(group * (n // g), (group + 1) * (n // g))
        expected += [q[head * d : (head + 1) * d] for head in heads]
        expected += [k[group * d : (group + 1) * d], v[group * d : (group + 1) * d]]
    assert torch.equal(fused, torch.cat(expected))


def test_patch_convolution_is_one_matrix() -> None:
    model = tiny_model()
    weight, patches = (torch.randn(count, 3, 16, 16, dtype=torch.float64) for count in (5, 7))
    (matrix,) = PATCH_CONVOLUTION.to_mcore((weight,), model)
    convolved = torch.nn.functional.conv2d(patches, weight, stride=16).flatten(1)
    torch.testing.assert_close(patches.flatten(1) @ matrix.T, convolved)


def test_layers_stack_on_the_first_axis(tmp_path: Path) -> None:
    layers = write_checkpoint(tmp_path / "one", tiny_model())
    convert_to_hf(tmp_path / "one", tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "two")
    names = [f"language_model.model.layers.{layer}.input_layernorm.weight" for layer in range(2)]
    stacked = read_tensors(tmp_path / "two")["decoder.layers.input_layernorm.weight"]
    assert torch.equal(stacked, torch.stack([layers[name] for name in names]))
