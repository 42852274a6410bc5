"""The chunked loss head equals torch's cross entropy of all positions' logits, and never holds all of them."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from navil_megatron.blueprint.parameters import EMBEDDING, HEAD
from navil_megatron.blueprint.vocabulary import words_of_rank
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.kernels import Kernels
from navil_megatron.layers.loss_head import LossHead
from navil_megatron.models.build import build_model
from navil_megatron.training.batch import build_model_inputs
from navil_megatron.training.optimizer import wrap_ddp
from tests.oracle import MIXED, TEXT_ONLY, global_batch, oracle_config
from tests.ranks import run_ranks, start_session, tiny_config
from tests.tolerances import BF16_CHUNKS, ONE_CHUNK, RANKS
from tools.bench.turns import peak_bytes

VOCABULARIES = (48, 200, 256)
"""Of 128 rows a rank: on two ranks the second has no word, 72 and no padding."""
WIDTH, ROWS = 16, 17
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
    words = words_of_rank(vocabulary, session.groups.tp.rank(), session.groups.tp.size())
    head.weight.data.zero_()
    head.weight.data[: len(words)] = whole[words.start : words.stop]
    head.weight.requires_grad_(not frozen)
    return head


def gradients(losses: torch.Tensor, hidden: torch.Tensor, head: LossHead) -> list[torch.Tensor]:
    """Of a sum whose weights differ from position to position, scaled as core scales a loss."""
    wanted = [hidden] + [head.weight] * head.weight.requires_grad
    return list(torch.autograd.grad((losses * torch.linspace(0.5, 2.0, len(losses))).sum() / 3, wanted))


def differences(rank: int, world_size: int, dtype: torch.dtype, frozen: bool, rows: int, vocabulary: int) -> None:
    with start_session(rank, world_size, parallel={"tp": world_size}) as session:
        head = build_head(session, vocabulary, WIDTH, dtype, frozen)
        num_words = len(words_of_rank(vocabulary, rank, world_size))
        generator = torch.Generator().manual_seed(4)
        hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
        labels = torch.randint(vocabulary, (rows,), generator=generator)
        logits = head(hidden, None, None, 1)
        assert logits.shape == (rows, vocabulary)
        expected = functional.cross_entropy(logits.float(), labels, reduction="none")
        expected_gradients = gradients(expected, hidden, head)
        for chunk_tokens in CHUNKS:
            losses = head(hidden, None, labels, chunk_tokens)
            assert losses.dtype == torch.float32
            torch.testing.assert_close(losses, expected, **RANKS)
            of_chunks = gradients(losses, hidden, head)
            assert frozen or not of_chunks[1][num_words:].any()
            for found, wanted in zip(of_chunks, expected_gradients, strict=True):
                assert found.dtype == dtype
                if dtype is torch.float32:
                    torch.testing.assert_close(found, wanted, **RANKS)
                else:
                    distance = (found.float() - wanted.float()).norm()
                    assert distance <= BF16_CHUNKS * wanted.float().norm()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_equal_all_positions_at_once(world_size: int, dtype: torch.dtype, vocabulary: int) -> None:
    run_ranks(world_size, differences, dtype, False, ROWS, vocabulary)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_frozen_head_has_no_gradient_and_passes_the_right_one(world_size: int) -> None:
    run_ranks(world_size, differences, torch.float32, True, ROWS, 200)


def test_no_predicted_position_leaves_a_zero_gradient() -> None:
    run_ranks(2, differences, torch.float32, False, 0, 200)


def sums_by_library(rank: int, world_size: int) -> tuple[list[tuple[int, ...]], bool]:
    """Shapes that a kernel library is given to add up, and whether its sum is the gradient."""
    seen = []

    def add_weight_gradient(total: torch.Tensor, grad_output: torch.Tensor, rows: torch.Tensor) -> None:
        seen.append((*total.shape, *grad_output.shape, *rows.shape))
        TORCH_KERNELS.add_weight_gradient(total, 2 * grad_output, rows)

    with start_session(rank, world_size) as session:
        found = []
        for kernels in (TORCH_KERNELS, replace(TORCH_KERNELS, add_weight_gradient=add_weight_gradient)):
            head = build_head(session, 48, WIDTH, torch.float32, False, kernels)
            hidden = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(4)).requires_grad_()
            found.append(gradients(head(hidden, None, torch.arange(ROWS), 10), hidden, head))
        return seen, torch.equal(found[1][0], found[0][0]) and torch.equal(found[1][1], 2 * found[0][1])


def test_the_weights_gradient_is_summed_by_the_kernel_library() -> None:
    ((seen, equal),) = run_ranks(1, sums_by_library)
    assert seen == [(128, WIDTH, rows, 128, rows, WIDTH) for rows in (10, 7)]
    assert equal


def sums_under_ddp(rank: int, world_size: int, sections: dict, rtol: float) -> None:
    """Two microbatches of a whole model: every gradient is plain autograd's, and the head's grows where DDP has it."""
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        (model,) = build_model(config, session.groups, session.device)
        batch = [build_model_inputs(row) for row in global_batch(config, (MIXED, TEXT_ONLY), session)]
        first, expected = {}, {}
        for inputs, found in zip(batch, (first, expected), strict=True):
            model(inputs).sum().backward()
            found |= {key: p.grad.float().clone() for key, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        name = EMBEDDING if config.model.language.tied_embeddings else HEAD
        head = model.get_parameter(name)
        places = set()

        def add_weight_gradient(total: torch.Tensor, grad_output: torch.Tensor, rows: torch.Tensor) -> None:
            places.add((total.data_ptr(), *total.shape))
            TORCH_KERNELS.add_weight_gradient(total, grad_output, rows)

        model.output_layer.kernels = replace(model.output_layer.kernels, add_weight_gradient=add_weight_gradient)
        (chunk,) = wrap_ddp(config, session, [model])
        for _ in range(2):
            chunk.zero_grad_buffer()
            with chunk.no_sync():
                chunk(batch[0]).sum().backward()
                assert rtol == BF16_CHUNKS or torch.equal(head.main_grad, first[name])
            chunk(batch[1]).sum().backward()
            chunk.finish_grad_sync()
            for key, parameter in model.named_parameters():
                assert parameter.grad is None
                distance = (parameter.main_grad - expected[key]).norm()
                assert distance <= rtol * expected[key].norm(), f"{key}: {distance}"
        assert places == {(head.main_grad.data_ptr(), *head.shape)}
        # Evaluation outside of a step leaves the sums alone.
        before = head.main_grad.clone()
        with torch.no_grad():
            chunk(batch[0])
        assert torch.equal(head.main_grad, before)


@pytest.mark.parametrize(("precision", "rtol"), [("fp32", RANKS["rtol"]), ("bf16", BF16_CHUNKS)])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_gradient_grows_in_the_buffer_of_ddp(
    tied: bool, overlap: bool, precision: str, rtol: float
) -> None:
    sections = {"model": {"language": {"tied_embeddings": tied}}, "optimizer": {"overlap_grad_reduce": overlap}}
    run_ranks(1, sums_under_ddp, {**sections, "precision": {"type": precision}}, rtol)


def peak_of(head: LossHead, rows: int, chunk_tokens: int) -> int:
    """Most bytes that a forward and backward pass has allocated at once, as the CPU allocator saw it."""
    hidden = torch.randn(rows, head.weight.shape[1], dtype=head.weight.dtype, requires_grad=True)
    labels = torch.randint(head.vocab_size, (rows,))
    return peak_bytes(lambda: head(hidden, None, labels, chunk_tokens).sum().backward(), torch.device("cpu"))


def peaks(rank: int, world_size: int, dtype: torch.dtype, trained: str) -> dict[tuple[int, int], int]:
    with start_session(rank, world_size) as session:
        found = {}
        for vocabulary in (2_048, 4_096):
            head = build_head(session, vocabulary, 64, dtype, trained == "frozen")
            if trained == "in DDP":
                wrap_ddp(tiny_config(), session, [head])
            found |= {(vocabulary, rows): peak_of(head, rows, chunk_tokens=64) for rows in (512, 1_024)}
        return found


@pytest.mark.parametrize("trained", ["frozen", "alone", "in DDP"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_with_the_vocabulary_by_one_chunk_and_with_tokens_by_their_hidden_states(
    dtype: torch.dtype, trained: str
) -> None:
    (found,) = run_ranks(1, peaks, dtype, trained)
    size = dtype.itemsize
    # In bf16 the logits exist in both types while one becomes the other.
    rounded = 0 if dtype is torch.float32 else size
    chunk = 64 * 2_048 * (4 + rounded)
    # As large as the weight, whatever the tokens: one chunk's part of its gradient where that is rounded, and where DDP
    # has no FP32 sum of it, that sum and the gradient.
    weight = 2_048 * 64 * {"frozen": 0, "alone": 4 + rounded, "in DDP": rounded}[trained]
    for rows in (512, 1_024):
        assert found[4_096, rows] - found[2_048, rows] <= ONE_CHUNK * (chunk + weight)
    # A gradient of the hidden state and a few numbers (label, maximum, sum, its logarithm, ...) a position.
    for vocabulary in (2_048, 4_096):
        assert found[vocabulary, 1_024] - found[vocabulary, 512] <= 512 * (64 * size + 6 * 8)
    assert found[4_096, 1_024] < 1_024 * 4_096 * 4 / 4
