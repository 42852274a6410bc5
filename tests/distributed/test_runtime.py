"""megatron-core on gloo ranks equals one rank: tensor, data and pipeline parallelism through the CPU seam."""

import functools
import os
import signal
import time

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from navil_megatron.config.errors import UserError
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.runtime.mcore_on_cpu import require_tested_megatron_core
from navil_megatron.runtime.session import Session, data_parallel_size
from tests.ranks import RankFailure, run_ranks, start_session
from tests.tolerances import RANKS

WIDTH, INNER, TOKENS, BATCH = 16, 24, 8, 2


def _full_weights(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return draw(INNER, WIDTH), draw(WIDTH, INNER), draw(TOKENS, BATCH, WIDTH)


def _tensor_parallel(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    with start_session(rank, world_size, parallel={"tp": world_size, "sequence_parallel": True}) as session:
        config = ModelParallelConfig(
            tensor_model_parallel_size=world_size, sequence_parallel=world_size > 1, params_dtype=torch.float64
        )
        common = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False, "skip_bias_add": False}
        up = ColumnParallelLinear(WIDTH, INNER, gather_output=False, tp_group=session.groups.tp, **common)
        down = RowParallelLinear(INNER, WIDTH, input_is_parallel=True, tp_group=session.groups.tp, **common)
        full_up, full_down, tokens = _full_weights()
        mine = slice(
            session.groups.tp.rank() * TOKENS // world_size, (session.groups.tp.rank() + 1) * TOKENS // world_size
        )
        up.weight.data.copy_(full_up.chunk(world_size, 0)[rank])
        down.weight.data.copy_(full_down.chunk(world_size, 1)[rank])
        hidden = tokens[mine].clone().requires_grad_()
        output = down(torch.nn.functional.gelu(up(hidden)[0]))[0]
        (output**2).sum().backward()
        return {"output": output.detach(), "hidden": hidden.grad, "up": up.weight.grad, "down": down.weight.grad}


def _expected_of_one_rank() -> dict[str, torch.Tensor]:
    up, down, hidden = (tensor.requires_grad_() for tensor in _full_weights())
    output = torch.nn.functional.gelu(hidden @ up.T) @ down.T
    (output**2).sum().backward()
    return {"output": output.detach(), "hidden": hidden.grad, "up": up.grad, "down": down.grad}


@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_and_sequence_parallel_equals_one_rank(world_size: int) -> None:
    expected = _expected_of_one_rank()
    ranks = run_ranks(world_size, _tensor_parallel)
    for name, axis in {"output": 0, "hidden": 0, "up": 0, "down": 1}.items():
        whole = torch.cat([rank[name] for rank in ranks], dim=axis)
        torch.testing.assert_close(whole, expected[name], **RANKS)


class TwoStages(MegatronModule):
    """One linear layer a pipeline stage."""

    def __init__(self, config: TransformerConfig, session: Session) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        full_up, full_down, _ = _full_weights()
        weights = {(0, 1): (full_up, full_down), (0, 2): (full_up,), (1, 2): (full_down,)}
        self.layers = torch.nn.ParameterList(
            torch.nn.Parameter(weight.clone()) for weight in weights[session.groups.pp.rank(), session.groups.pp.size()]
        )
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        self.received = received[0]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden if self.received is None else self.received
        for weight in self.layers:
            hidden = hidden @ weight.T
        return hidden


def _pipeline(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    with start_session(rank, world_size, parallel={"pp": world_size}) as session:
        config = TransformerConfig(
            num_layers=2,
            hidden_size=INNER,
            num_attention_heads=2,
            pipeline_model_parallel_size=world_size,
            pipeline_dtype=torch.float64,
            calculate_per_token_loss=True,
        )
        model = TwoStages(config, session)
        _, _, tokens = _full_weights()
        microbatches = iter([tokens, 2 * tokens, -tokens])

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            total = (output**2).sum()
            return total, torch.tensor(output.shape[0], dtype=torch.int), {"loss": total.detach().clone()}

        def forward_step(iterator, chunk):  # type: ignore[no-untyped-def]
            return chunk(next(iterator)), loss

        reduced = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=microbatches,
            model=[model],
            num_microbatches=3,
            seq_length=TOKENS,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        assert bool(reduced) == session.is_last_stage
        return [[weight.grad for weight in model.layers], [entry["loss"] for entry in reduced]]


def test_pipeline_schedule_equals_one_stage() -> None:
    (one,) = run_ranks(1, _pipeline)
    first, last = run_ranks(2, _pipeline)
    torch.testing.assert_close(first[0] + last[0], one[0], **RANKS)
    torch.testing.assert_close(last[1], one[1], **RANKS)


def _reduced_gradients(rank: int, world_size: int, distributed: bool) -> torch.Tensor:
    with start_session(rank, world_size):
        config = TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=2)

        class OneMatrix(MegatronModule):
            def __init__(self) -> None:
                super().__init__(config)
                self.weight = torch.nn.Parameter(_full_weights()[0].float())

            def forward(self, tokens: torch.Tensor) -> torch.Tensor:
                return tokens @ self.weight.T

        wrapped = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed),
            OneMatrix(),
        )
        tokens = _full_weights()[2].float()[:, rank : rank + 2 // world_size]
        (wrapped(tokens) ** 2).sum().backward()
        wrapped.finish_grad_sync()
        flat = wrapped.module.weight.main_grad.flatten()
        if not distributed:
            return flat.clone()
        shards = list(flat.chunk(world_size))
        gathered = torch.cat(
            [shards[rank] if other == rank else torch.zeros_like(shards[other]) for other in range(world_size)]
        )
        torch.distributed.all_reduce(gathered)
        return gathered


@pytest.mark.parametrize("distributed", [False, True])
def test_data_parallel_gradients_equal_one_rank(distributed: bool) -> None:
    (one,) = run_ranks(1, _reduced_gradients, distributed)
    for gradient in run_ranks(2, _reduced_gradients, distributed):
        torch.testing.assert_close(gradient * 2, one, **RANKS)


def _dispatch_to_experts(rank: int, world_size: int) -> tuple[float, float]:
    """Sends every token to the expert of its parity and back; the two experts, one a rank, multiply by 2 and 3."""
    with start_session(rank, world_size, parallel={"ep": world_size}) as session:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=WIDTH,
            num_attention_heads=2,
            num_moe_experts=2,
            moe_router_topk=1,
            moe_router_pre_softmax=True,
            expert_model_parallel_size=world_size,
            moe_token_dispatcher_type="alltoall",
            add_bias_linear=False,
        )
        dispatcher = MoEAlltoAllTokenDispatcher(1, [session.groups.ep.rank()], config, session.groups)
        tokens = _full_weights(rank)[2].float().requires_grad_()
        expert_of = torch.arange(TOKENS * BATCH) % 3 % 2
        routing = torch.nn.functional.one_hot(expert_of, 2).bool()
        sent, probs = dispatcher.dispatch_preprocess(tokens, routing, routing.float())
        sent, probs = dispatcher.token_dispatch(sent, probs)
        here, _, _ = dispatcher.dispatch_postprocess(sent, probs)
        back = dispatcher.combine_preprocess(here * (2.0 + session.groups.ep.rank()))
        output = dispatcher.combine_postprocess(dispatcher.token_combine(back))
        factor = (2.0 + expert_of).view(TOKENS, BATCH, 1)
        output.sum().backward()
        return float((output - tokens * factor).abs().max()), float((tokens.grad - factor).abs().max())


def test_tokens_travel_to_experts_on_other_ranks_and_back() -> None:
    for wrong_output, wrong_gradient in run_ranks(2, _dispatch_to_experts):
        assert wrong_output == wrong_gradient == 0.0


def _places(rank: int, world_size: int) -> tuple[int, ...]:
    with start_session(rank, world_size, parallel={"tp": 2, "pp": 2}) as session:
        assert session.groups.tp.size() == parallel_state.get_tensor_model_parallel_world_size() == 2
        return (
            session.groups.tp.rank(),
            session.groups.pp.rank(),
            session.groups.dp.rank(),
            session.is_first_stage,
            session.is_last_stage,
        )


def test_ranks_know_their_place_in_the_layout() -> None:
    assert run_ranks(4, _places) == [
        (0, 0, 0, True, False),
        (1, 0, 0, True, False),
        (0, 1, 0, False, True),
        (1, 1, 0, False, True),
    ]


def _stop_on_one_rank(rank: int, world_size: int) -> list[bool]:
    with start_session(rank, world_size) as session:
        before = session.stop_asked()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # once from the scheduler, once through torchrun
        return [before, session.stop_asked(), session.was_asked_to_stop]


def test_stop_signal_of_one_rank_reaches_all() -> None:
    assert run_ranks(2, _stop_on_one_rank) == [[False, True, False], [False, True, True]]


def _start_and_close_twice(rank: int, world_size: int) -> list[list[float]]:
    found = []
    for axis in ("tp", "cp"):
        with start_session(rank, world_size, parallel={axis: 2}) as session:
            backend = session.replica._get_backend(session.device)
            found.append([session.replica.size(), backend.options._timeout.total_seconds()])
    return found


def test_a_session_can_follow_another_and_a_replica_waits_as_long_as_all_ranks() -> None:
    assert run_ranks(2, _start_and_close_twice) == [[[2, 210.0], [2, 210.0]]] * 2


@pytest.mark.parametrize(
    ("parallel", "world_size", "found"),
    [
        (ParallelConfig(tensor_model_parallel_size=2), 3, "3 ranks do not fit.*multiple of 2"),
        (ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2), 2, "expert 2.*multiple of 4"),
    ],
)
def test_wrong_world_size_is_one_clear_line(parallel: ParallelConfig, world_size: int, found: str) -> None:
    with pytest.raises(UserError, match=found) as error:
        data_parallel_size(parallel, world_size)
    assert "\n" not in str(error.value)


def test_untested_megatron_core_is_refused() -> None:
    require_tested_megatron_core("0.19.7")
    with pytest.raises(RuntimeError, match="0.20.0 was not tested"):
        require_tested_megatron_core("0.20.0")


def _fail_on_rank_one(rank: int, world_size: int) -> None:
    with start_session(rank, world_size):
        if rank == 1:
            raise ValueError("the broken one")
        torch.distributed.barrier()


def test_first_failure_is_raised_with_its_rank() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 of 2(?s:.*)the broken one"):
        run_ranks(2, _fail_on_rank_one)


def _hang_on_rank_zero(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(60)


def test_hung_ranks_are_killed_and_their_stacks_shown() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailure, match="_hang_on_rank_zero"):
        run_ranks(2, _hang_on_rank_zero, timeout=1)
    assert time.monotonic() - started < 10
