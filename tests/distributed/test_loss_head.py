"""The chunked loss head equals megatron-core's head and cross entropy of all positions, and never holds all logits."""

from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.transformer.transformer_config import TransformerConfig

from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.kernels import Kernels
from navil_megatron.layers.loss_head import LossHead
from tests.ranks import run_ranks, start_session
from tests.tolerances import BF16_CHUNKS, ONE_CHUNK, RANKS
from tools.bench.turns import peak_bytes

VOCABULARY, WIDTH, ROWS = 48, 16, 17
CHUNKS = (1, 5, 17, 64)


def build_head(
    session, vocabulary: int, width: int, dtype: torch.dtype, frozen: bool, kernels: Kernels = TORCH_KERNELS
) -> LossHead:
    """The same whole matrix at every layout."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=width,
        num_attention_heads=2,
        perform_initialization=False,
        params_dtype=dtype,
        tensor_model_parallel_size=session.groups.tp.size(),
        gradient_accumulation_fusion=False,
    )
    head = LossHead(
        width,
        vocabulary,
        kernels,
        config=config,
        init_method=config.init_method,
        bias=False,
        tp_group=session.groups.tp,
    )
    whole = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(3))
    head.weight.data.copy_(whole.chunk(session.groups.tp.size())[session.groups.tp.rank()])
    head.weight.requires_grad_(not frozen)
    return head


def gradients(losses: torch.Tensor, hidden: torch.Tensor, head: LossHead) -> list[torch.Tensor]:
    """Of a sum whose weights differ from position to position, scaled as core scales a loss."""
    wanted = [hidden] + [head.weight] * head.weight.requires_grad
    return list(torch.autograd.grad((losses * torch.linspace(0.5, 2.0, len(losses))).sum() / 3, wanted))


def differences(rank: int, world_size: int, dtype: torch.dtype, frozen: bool, rows: int) -> None:
    with start_session(rank, world_size, parallel={"tp": world_size}) as session:
        head = build_head(session, VOCABULARY, WIDTH, dtype, frozen)
        generator = torch.Generator().manual_seed(4)
        hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
        labels = torch.randint(VOCABULARY, (rows,), generator=generator)
        logits = head(hidden, None, None, 1)
        assert logits.shape == (rows, VOCABULARY // world_size)
        expected = vocab_parallel_cross_entropy(logits.float(), labels, tp_group=session.groups.tp)
        expected_gradients = gradients(expected, hidden, head)
        for chunk_tokens in CHUNKS:
            losses = head(hidden, None, labels, chunk_tokens)
            assert losses.dtype == torch.float32
            torch.testing.assert_close(losses, expected, **RANKS)
            for found, wanted in zip(gradients(losses, hidden, head), expected_gradients, strict=True):
                assert found.dtype == dtype
                if dtype is torch.float32:
                    torch.testing.assert_close(found, wanted, **RANKS)
                else:
                    distance = (found.float() - wanted.float()).norm()
                    assert distance <= BF16_CHUNKS * wanted.float().norm()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_equal_all_positions_at_once(world_size: int, dtype: torch.dtype) -> None:
    run_ranks(world_size, differences, dtype, False, ROWS)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_frozen_head_has_no_gradient_and_passes_the_right_one(world_size: int) -> None:
    run_ranks(world_size, differences, torch.float32, True, ROWS)


def test_no_predicted_position_leaves_a_zero_gradient() -> None:
    run_ranks(2, differences, torch.float32, False, 0)


def sums_by_library(rank: int, world_size: int) -> tuple[list[tuple[int, ...]], bool]:
    """Shapes that a kernel library is given to add up, and whether its sum is the gradient."""
    seen = []

    def add_weight_gradient(total: torch.Tensor, grad_output: torch.Tensor, rows: torch.Tensor) -> None:
        seen.append((*total.shape, *grad_output.shape, *rows.shape))
        TORCH_KERNELS.add_weight_gradient(total, 2 * grad_output, rows)

    with start_session(rank, world_size) as session:
        found = []
        for kernels in (TORCH_KERNELS, replace(TORCH_KERNELS, add_weight_gradient=add_weight_gradient)):
            head = build_head(session, VOCABULARY, WIDTH, torch.float32, False, kernels)
            hidden = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(4)).requires_grad_()
            found.append(gradients(head(hidden, None, torch.arange(ROWS), 10), hidden, head))
        return seen, torch.equal(found[1][0], found[0][0]) and torch.equal(found[1][1], 2 * found[0][1])


def test_the_weights_gradient_is_summed_by_the_kernel_library() -> None:
    ((seen, equal),) = run_ranks(1, sums_by_library)
    assert seen == [(VOCABULARY, WIDTH, rows, VOCABULARY, rows, WIDTH) for rows in (10, 7)]
    assert equal


def peak_of(head: LossHead, rows: int, chunk_tokens: int) -> int:
    """Most bytes that a forward and backward pass has allocated at once, as the CPU allocator saw it."""
    vocabulary, width = head.weight.shape
    hidden = torch.randn(rows, width, dtype=head.weight.dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,))
    return peak_bytes(lambda: head(hidden, None, labels, chunk_tokens).sum().backward(), torch.device("cpu"))


def peaks(rank: int, world_size: int, dtype: torch.dtype, frozen: bool) -> dict[tuple[int, int], int]:
    with start_session(rank, world_size) as session:
        return {
            (vocabulary, rows): peak_of(build_head(session, vocabulary, 8, dtype, frozen), rows, chunk_tokens=64)
            for vocabulary in (2_000, 4_000)
            for rows in (512, 1_024)
        }


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_with_the_vocabulary_by_one_chunk_and_with_tokens_by_their_hidden_states(
    dtype: torch.dtype, frozen: bool
) -> None:
    (found,) = run_ranks(1, peaks, dtype, frozen)
    size = dtype.itemsize
    # In bf16 the logits exist in both types while one becomes the other.
    chunk = 64 * 2_000 * (4 if dtype is torch.float32 else 4 + size)
    # The weight's gradient, its FP32 sum and one chunk's part of it are as large as the weight, whatever the tokens.
    weight = 0 if frozen else 2_000 * 8 * (4 if dtype is torch.float32 else 4 + size)
    for rows in (512, 1_024):
        assert found[4_000, rows] - found[2_000, rows] <= ONE_CHUNK * (chunk + weight)
    # A gradient of the hidden state and a few numbers (label, maximum, sum, its logarithm, ...) a position.
    for vocabulary in (2_000, 4_000):
        assert found[vocabulary, 1_024] - found[vocabulary, 512] <= 512 * (8 * size + 6 * 8)
    assert found[4_000, 1_024] < 1_024 * 4_000 * 4 / 4
