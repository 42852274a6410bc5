"""Special tokens' own embeddings: their values and gradients, and how little the backward pass does for them."""

import pytest
import torch

from navil_megatron.layers.special_tokens import SpecialTokenEmbedding
from tests.held_memory import watching
from tests.operators import Operators
from tests.ranks import tiny_config

MODEL = tiny_config().model
IDS = torch.tensor(MODEL.special_token_ids)


def case(num_tokens: int, dtype: torch.dtype) -> tuple[SpecialTokenEmbedding, torch.Tensor, torch.Tensor]:
    """A table of small whole numbers, the text table's embeddings, and ids of which one comes most often."""
    generator = torch.Generator().manual_seed(num_tokens)
    layer = SpecialTokenEmbedding(MODEL, dtype)
    layer.weight.data.copy_(torch.randint(-8, 8, layer.weight.shape, generator=generator))
    ids = torch.randint(MODEL.language.vocab_size, (num_tokens,), generator=generator)
    ids[: num_tokens // 2] = IDS[2]
    embeddings = torch.randint(-8, 8, (num_tokens, MODEL.language.hidden_size), generator=generator).to(dtype)
    return layer, embeddings.requires_grad_(), ids


@pytest.mark.parametrize("num_tokens", [0, 1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["embeddings", "table", "neither"])
def test_values_and_gradients_are_those_of_a_token_by_token_loop(
    num_tokens: int, dtype: torch.dtype, frozen: str
) -> None:
    layer, embeddings, ids = case(num_tokens, dtype)
    embeddings.requires_grad_(frozen != "embeddings")
    layer.weight.requires_grad_(frozen != "table")
    found = layer(embeddings, ids)
    # Sums of so few small whole numbers are exact in any order, and in BF16 if they are made in FP32.
    grad = torch.randint(-1, 2, found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if found.requires_grad:
        found.backward(grad)
    expected, of_embeddings, of_table = embeddings.detach().clone(), grad.clone(), torch.zeros(layer.weight.shape)
    for place, token in enumerate(ids.tolist()):
        if token in MODEL.special_token_ids:
            row = MODEL.special_token_ids.index(token)
            expected[place] = layer.weight[row].detach()
            of_table[row] += grad[place]
            of_embeddings[place] = 0
    assert torch.equal(found, expected)
    assert embeddings.grad is None if frozen == "embeddings" else torch.equal(embeddings.grad, of_embeddings)
    assert layer.weight.grad is None if frozen == "table" else torch.equal(layer.weight.grad, of_table.to(dtype))


def test_the_backward_pass_adds_nothing_up_row_by_row() -> None:
    """On a GPU the gradient of an index is a sort, and then a serial sum for each row."""
    layer, embeddings, ids = case(300, torch.float32)
    found = layer(embeddings, ids)
    with Operators() as seen:
        found.sum().backward()
    assert seen.names.count("mm") == 1
    assert not {"index_put", "index_put_", "_index_put_impl_", "index_add_", "embedding_dense_backward"} & {*seen.names}


def test_it_keeps_one_number_a_token() -> None:
    layer, embeddings, ids = case(300, torch.float32)
    with watching([layer.weight]) as held:
        layer(embeddings, ids)
    assert held.num_bytes == 300 * 8
