"""A step asks the device for one value: loss and gradient norm, before the update. Nowhere else is there a size, a mask
or a number, in forward, backward or update.
"""

import pytest
import torch

from navil_megatron.models.build import build_model
from navil_megatron.training.feature_scale import FeatureScale
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.state import TrainingState
from navil_megatron.training.step import train_step
from tests.distributed.test_layouts import MODELS
from tests.host_reads import watching_host_reads
from tests.oracle import IMAGE_ONLY, MIXED, TEXT_ONLY, global_batch, merge_sections, oracle_config
from tests.ranks import run_ranks, start_session

BATCH = (MIXED, TEXT_ONLY, IMAGE_ONLY)
EXPERTS = {"model": {"language": {"num_experts": 4, "experts_per_token": 2}}}
CHOICES = {
    **{name: {"model": model} for name, model in MODELS.items()},
    "frozen": {"training": {"phase": "s1.1"}},
    "several experts": EXPERTS,
    "several experts, one a token, recompute": merge_sections(
        {"model": {"language": {"num_experts": 2}}}, {"training": {"recompute": "full"}}
    ),
    "selective": {
        "training": {"recompute": "selective", "recompute_modules": ("attention", "mlp", "encoder")},
    },
    "full": {"training": {"recompute": "full"}},
    "bf16": {"precision": {"type": "bf16"}},
}
PLACES = {
    "tp2-sp": (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
    "pp2-interleaved": (2, {"parallel": {"pp": 2, "vpp": 2}, "training": {"recompute": "full"}}),
    "tp2-sp-experts": (2, {"parallel": {"tp": 2, "sequence_parallel": True}, **EXPERTS}),
    "tp2-sp-etp1-experts": (2, {"parallel": {"tp": 2, "sequence_parallel": True, "etp": 1}, **EXPERTS}),
    "cp2": (2, {"parallel": {"cp": 2}}),
    "ep2": (2, {"parallel": {"ep": 2}}),
    "cp2-experts": (2, {"parallel": {"cp": 2}, **EXPERTS}),
    "ep2-experts": (2, {"parallel": {"ep": 2}, **EXPERTS}),
}

HOST_GENERATOR = "megatron/core/tensor_parallel/random.py"
"""Compares states of the host's random generator, which are on the host with a GPU too."""
ASKED = "return of_all.view(session.world_size, -1).T.tolist()"
"""The one read of a step."""
DISPATCHER = "megatron/core/transformer/moe/"
TAKEN_UP = "numbers = iter(num_rows.tolist())"


def reads_of_step(rank: int, world_size: int, choices: list[dict]) -> list[str]:
    """What a step of several microbatches reads, from their host-side rows to the updated weights."""
    found = []
    for sections in choices:
        config = oracle_config(**merge_sections(sections, {"logging": {"feature_scale_every_steps": 1}}))
        with start_session(rank, world_size, config) as session:
            chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
            optimizer = build_optimizer(config, chunks, session)
            FeatureScale(config, chunks, session.groups, session.device, TrainingState())
            batch = global_batch(config, (*BATCH, MIXED), session)
            with watching_host_reads() as reads:
                train_step(config, session, chunks, optimizer, batch, lr=1e-2)
            assert sum(ASKED in read for read in reads) == 1
            found += [read for read in reads if ASKED not in read]
    return found


def test_one_rank_reads_nothing_else() -> None:
    assert run_ranks(1, reads_of_step, list(CHOICES.values())) == [[]]


@pytest.mark.parametrize("place", [place for place in PLACES if not place.startswith("ep2")])
def test_ranks_read_nothing_else(place: str) -> None:
    world_size, sections = PLACES[place]
    for reads in run_ranks(world_size, reads_of_step, [sections]):
        assert [read for read in reads if HOST_GENERATOR not in read] == []


@pytest.mark.parametrize("place", ["ep2", "ep2-experts"])
def test_expert_parallel_ranks_read_only_in_the_dispatcher_of_megatron_core(place: str) -> None:
    """It counts the rows of each expert on the device and sends the counts to the host, where we take them up."""
    world_size, sections = PLACES[place]
    for reads in run_ranks(world_size, reads_of_step, [merge_sections(sections, CHOICES["selective"])]):
        assert [read for read in reads if not any(words in read for words in (DISPATCHER, TAKEN_UP))] == []


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), torch.ones(1)),
        lambda x: x.masked_select(x > 0),
        lambda x: x.__setitem__(x > 0, torch.ones(1)),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_watch_sees_every_kind_of_read(read) -> None:
    with watching_host_reads() as reads:
        read(torch.tensor([1.0, -1.0]))
    assert reads


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad.tolist()
        return grad


def test_the_watch_sees_the_backward_pass() -> None:
    x = torch.ones(2, requires_grad=True)
    with watching_host_reads() as reads:
        _ReadsInBackward.apply(x).sum().backward()
    assert reads


def test_the_watch_lets_pass_what_stays_on_the_device() -> None:
    x, order = torch.tensor([1.0, -1.0], requires_grad=True), torch.tensor([1, 0])
    with watching_host_reads() as reads:
        torch.where(x > 0, x, 0.0)[order].index_select(0, order).sum().backward()
    assert reads == []


def test_the_watch_lets_a_number_fill_a_mask() -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, 3.0]])
    with watching_host_reads() as reads:
        x[x > 2] = 0
        x[x[:, 0] > 0, :] = 0
    assert reads == [] and x.tolist() == [[0.0, 0.0], [-1.0, 0.0]]
