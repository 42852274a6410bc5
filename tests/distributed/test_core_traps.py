"""What megatron-core 0.19 does to whoever builds on it, and the test that holds our answer to each.

Each line was checked by taking the answer away: then the test fails. The tests that no other file has are here.

CPU ranks: calls torch.cuda, writes device="cuda"    test_the_seam_gives_every_name_a_meaning_on_a_cpu
CPU ranks: generator states are queued for a GPU     test_drawing_for_one_rank_leaves_the_common_generator_alone
CPU ranks: all-to-all splits stay tensors            test_tokens_travel_to_experts_on_other_ranks_and_back
CPU ranks: uneven gathers, which gloo refuses        test_rows_of_any_mixture_equal_one_rank
its norm refuses sequence parallelism                test_layout_equals_one_rank[tp2-sp]
weights of split rows need a mark to be summed       the same, and test_every_kind_of_model_at_the_main_layouts
its attention refuses packed rows                    test_packed_samples_do_not_see_each_other
batched sends cross between two interleaved stages   test_layout_equals_one_rank[pp2-interleaved]
divides in place what the loss function returns      test_the_reported_loss_survives_core_dividing_it_in_place
takes a mean of microbatch means unless told         test_gradients_are_of_the_global_weighted_mean
its Adam's steps are one shared tensor after a load  test_save_and_restore_equals_going_straight
leaves groups' weight decay to its own scheduler     test_two_replicas_equal_torch_adamw
cannot save an optimizer before its first step       test_a_save_before_the_first_step_is_restored
optimizer state is stored as its layout split it     test_every_layout_reads_and_writes_the_same_tensors
keys of two optimizers begin with chained_0.         test_expert_parallel_and_one_rank_read_each_other
loading drops empty containers and closes gaps       test_frozen_experts_leave_checkpoints_those_of_one_rank
with nothing to train the optimizer is a stub        test_nothing_to_train_is_saved_and_restored
each of two optimizers gathers all weights           test_updated_weights_are_gathered_once
waits for gathered weights of called modules alone   test_overlap_equals_none
its metadata reader fails on torch 2.15              test_a_new_process_resumes_bit_for_bit
a save spawns a server process                       test_a_save_starts_no_process
a spawned process imports the main module again      test_importing_a_script_does_nothing
a save waits for ever without undeclared psutil      test_nothing_installed
makes its own readers, which un-pickle anything      test_the_reader_that_is_replaced_is_called_as_it_was
apex, nvidia-dali and navil on PyPI are others'      test_setup_asks_for_no_package_of_others
one expert a token needs moe_router_pre_softmax      test_layout_equals_one_rank[ep2]
experts with tensor need sequence parallelism        test_broken_rule
traps of FP8, Transformer Engine, learned routers    test_what_this_version_cannot_do_is_refused
"""

import functools
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as strategy
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as core_random
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch.distributed.checkpoint import FileSystemReader

from navil_megatron.blueprint.segments import SegmentOrder
from navil_megatron.kernels.torch_kernels import segment_attention
from navil_megatron.models.build import build_model
from navil_megatron.runtime.mcore_on_cpu import PATCHES
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import build_model_inputs
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step, weighted_loss
from tests.distributed.test_layouts import BATCH
from tests.oracle import global_batch, oracle_config
from tests.ranks import run_ranks, start_session
from tests.tolerances import RANKS

FACTORIES: dict[str, tuple] = {
    "empty": (2,),
    "zeros": (2,),
    "ones": (2,),
    "full": ((2,), 1.0),
    "tensor": ([1.0],),
    "arange": (2,),
    "rand": (2,),
    "randn": (2,),
    "randint": (5, (2,)),
    "empty_like": (torch.ones(2),),
    "zeros_like": (torch.ones(2),),
    "ones_like": (torch.ones(2),),
    "full_like": (torch.ones(2), 1.0),
}


def _meanings(session: Session) -> dict[tuple[str, str], Callable[[], Any]]:
    """For each name that the seam replaces: a use of it as core makes it, true where it did what a CPU can do."""
    cuda, group, rank = torch.cuda, session.groups.tp, session.groups.tp.rank()
    share = torch.full((rank + 1, 1), float(rank))
    random = "megatron.core.tensor_parallel.random"
    moe = "megatron.core.transformer.moe"
    meanings: dict[tuple[str, str], Callable[[], Any]] = {
        ("torch.cuda", "current_device"): lambda: torch.zeros(1, device=cuda.current_device()).is_cpu,
        ("torch.cuda", "set_device"): lambda: cuda.set_device(1) is None,
        ("torch.cuda", "synchronize"): lambda: cuda.synchronize() is None,
        ("torch.cuda", "current_stream"): lambda: cuda.current_stream().synchronize() is None,
        ("torch.cuda", "default_stream"): lambda: cuda.default_stream().wait_stream(cuda.current_stream()) is None,
        ("torch.cuda", "Stream"): lambda: cuda.Stream(device="cuda").record_event().query(),
        ("torch.cuda", "Event"): lambda: _passed(cuda.Event(enable_timing=True)),
        ("torch.cuda", "stream"): lambda: cuda.stream(cuda.Stream()).__enter__() is None,
        ("torch.cuda", "empty_cache"): lambda: cuda.empty_cache() is None,
        ("torch.cuda", "is_current_stream_capturing"): lambda: not cuda.is_current_stream_capturing(),
        ("torch.cuda", "get_rng_state"): lambda: torch.equal(cuda.get_rng_state(), torch.get_rng_state()),
        ("torch.cuda", "set_rng_state"): lambda: _puts_back(cuda.set_rng_state),
        ("torch.cuda", "manual_seed"): lambda: _puts_back(lambda _: cuda.manual_seed(5), torch.manual_seed(5)),
        ("torch.cuda.random", "get_rng_state"): lambda: torch.equal(
            cuda.random.get_rng_state(device="cuda"), torch.get_rng_state()
        ),
        ("torch:Tensor", "cuda"): lambda: share.cuda() is share,
        ("torch:Tensor", "type"): lambda: share.type() == "torch.cuda.FloatTensor",
        (random, "_get_cuda_rng_state"): lambda: torch.equal(
            core_random._get_cuda_rng_state(graph_safe=True), torch.get_rng_state()
        ),
        (random, "_set_cuda_rng_state"): lambda: _puts_back(core_random._set_cuda_rng_state),
        (f"{moe}.moe_utils", "maybe_move_tensor_to_cpu"): lambda: isinstance(
            moe_utils.maybe_move_tensor_to_cpu(share, as_numpy=True), np.ndarray
        ),
        (f"{moe}.token_dispatcher", "maybe_move_tensor_to_cpu"): lambda: isinstance(
            token_dispatcher.maybe_move_tensor_to_cpu(share, as_numpy=True), np.ndarray
        ),
        (mappings.__name__, "_gather_along_first_dim"): lambda: (
            mappings._gather_along_first_dim(share, group, [1, 2]).tolist() == [[0.0], [1.0], [1.0]]
        ),
        (mappings.__name__, "_reduce_scatter_along_first_dim"): lambda: torch.equal(
            mappings._reduce_scatter_along_first_dim(torch.ones(3, 1), group, [1, 2]), torch.full((rank + 1, 1), 2.0)
        ),
    }
    for name, arguments in FACTORIES.items():
        meanings["torch", name] = lambda name=name, arguments=arguments: all(
            getattr(torch, name)(*arguments, device=device).is_cpu for device in ("cuda", torch.device("cuda", 0))
        )
    return meanings


def _passed(event: Any) -> bool:
    event.record()
    return event.query()


def _puts_back(restore: Callable[[torch.Tensor], Any], _: Any = None) -> bool:
    """Whether ``restore`` brings the CPU's generator back to where it is now."""
    state = torch.get_rng_state()
    torch.rand(3)
    restore(state)
    return torch.equal(torch.get_rng_state(), state)


def _without_meaning(rank: int, world_size: int) -> tuple[set[tuple[str, str]], list[tuple[str, str]]]:
    originals = {(patch.owner, patch.name): _present(patch.owner, patch.name) for patch in PATCHES}
    with start_session(rank, world_size, parallel={"tp": 2}) as session:
        meanings = _meanings(session)
        wrong = [name for name, original in originals.items() if _present(*name) is original]
        return set(meanings), wrong + [name for name, holds in meanings.items() if not holds()]


def _present(owner: str, name: str) -> Any:
    return getattr(pkgutil.resolve_name(owner), name)


def test_the_seam_gives_every_name_a_meaning_on_a_cpu() -> None:
    """Trap: core calls torch.cuda in some 40 places; what of it runs depends on layout, machine and release of torch.

    Some names do no harm without a GPU, and would wake an idle one where a run on CPU ranks has one beside it.
    """
    for names, wrong in run_ranks(2, _without_meaning):
        assert names == {(patch.owner, patch.name) for patch in PATCHES}
        assert wrong == []


def _draws(rank: int, world_size: int) -> tuple[float, float]:
    with start_session(rank, world_size, parallel={"tp": 2}):
        with core_random.get_cuda_rng_tracker().fork():
            own = float(torch.rand(()))
        return own, float(torch.rand(()))


def test_drawing_for_one_rank_leaves_the_common_generator_alone() -> None:
    """Trap: without the seam, states set for a GPU are queued for ever, and the ranks of a group drift apart."""
    (own, common), (other_own, other_common) = run_ranks(2, _draws)
    assert own != other_own
    assert common == other_common


def test_packed_samples_do_not_see_each_other() -> None:
    """Trap: core's own attention refuses packed rows; ours gives each sample what it gets alone."""
    lengths, generator = [3, 5, 3, 1], torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (4, 2, 2))

    def attend(lengths: list[int], *rows: torch.Tensor) -> torch.Tensor:
        segments = SegmentOrder.of(lengths)
        order = torch.from_numpy(segments.order)
        ordered = (x[order] for x in rows)
        found = segment_attention(
            *ordered, groups=segments.groups, cu_seqlens=torch.empty(0), max_seqlen=0, causal=True
        )
        return torch.empty_like(found).index_copy_(0, order, found)

    alone = [
        attend([length], *(x.split(lengths)[number] for x in (query, key, value)))
        for number, length in enumerate(lengths)
    ]
    torch.testing.assert_close(attend(lengths, query, key, value), torch.cat(alone), **RANKS)


def _report_after_core(rank: int, world_size: int) -> tuple[float, float, float]:
    config = oracle_config()
    with start_session(rank, world_size, config) as session:
        (microbatch,) = global_batch(config, BATCH[:1], session)
        inputs = build_model_inputs(microbatch)
        losses = torch.ones_like(inputs.loss_weights, requires_grad=True)
        reports: list[dict[str, torch.Tensor]] = []
        divided, _ = forward_step_calc_loss(
            model=None,
            output_tensor=losses,
            loss_func=functools.partial(weighted_loss, inputs, 2),
            config=TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
            vp_stage=None,
            collect_non_loss_data=False,
            num_microbatches=4,
            forward_data_store=reports,
            cp_group_size=1,
            is_last_stage=True,
        )
        assert not reports[0]["loss_sum"].requires_grad
        return float(divided.detach()), float(reports[0]["loss_sum"]), float(inputs.loss_weights.sum())


def test_the_reported_loss_survives_core_dividing_it_in_place() -> None:
    """Trap: core divides in place what the loss function returns, by tokens and microbatches where it is not told."""
    ((divided, reported, expected),) = run_ranks(1, _report_after_core)
    assert reported == expected
    assert divided < expected / 2


def _gradients_of_step(rank: int, world_size: int) -> None:
    config = oracle_config(optimizer={"distributed": False, "clip_grad": None})
    with start_session(rank, world_size, config) as session:
        (plain,) = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        batch = global_batch(config, BATCH, session)
        train_step(config, session, chunks, optimizer, batch, lr=0.0)
        weight = sum(float(microbatch.loss_weights.sum()) for microbatch in batch)
        for microbatch in batch:
            inputs = build_model_inputs(microbatch)
            ((plain(inputs) * inputs.loss_weights).sum() / weight).backward()
        expected = dict(plain.named_parameters())
        for name, parameter in chunks[0].module.named_parameters():
            torch.testing.assert_close(parameter.main_grad, expected[name].grad, **RANKS)


def test_gradients_are_of_the_global_weighted_mean() -> None:
    """Trap: unless told, core takes a mean over each microbatch and then a mean of these means, at every layout."""
    run_ranks(1, _gradients_of_step)


def _gathers_of_step(rank: int, world_size: int, parallel: dict) -> list[int]:
    config = oracle_config(parallel=parallel)
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        gathers: Counter[int] = Counter()
        buckets = [bucket for chunk in chunks for bucket in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
        for number, bucket in enumerate(buckets):
            bucket.start_param_sync = functools.partial(_counted, bucket.start_param_sync, gathers, number)
        train_step(
            config, session, chunks, optimizer, global_batch(config, BATCH, session)[2 * rank : 2 * rank + 2], lr=1e-2
        )
        return [gathers[number] for number in range(len(buckets))]


def _counted(gather: Callable[..., Any], gathers: Counter[int], number: int, *args: Any, **kwargs: Any) -> Any:
    gathers[number] += 1
    return gather(*args, **kwargs)


@pytest.mark.parametrize("parallel", [{}, {"ep": 2}])
def test_updated_weights_are_gathered_once(parallel: dict) -> None:
    """Trap: with experts core has two distributed optimizers, and each gathers the weights of both."""
    for gathers in run_ranks(2, _gathers_of_step, parallel):
        assert gathers
        assert set(gathers) == {1}


def test_the_reader_that_is_replaced_is_called_as_it_was() -> None:
    """``checked_reading`` puts its own in both places; core asks for a folder's reader, and takes what torch does."""
    made = strategy._get_filesystem_reader
    assert serialization._get_filesystem_reader is made
    form = inspect.signature(made)
    assert [*form.parameters] == ["checkpoint_dir", "cache_metadata", "async_strategy"]
    assert form.return_annotation is FileSystemReader
