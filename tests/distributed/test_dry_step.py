"""A step on a GPU that is not there: it runs at every kind of layout, and refuses whatever a GPU would punish."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.modules.module import register_module_forward_hook

from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.types import ALONE
from navil_megatron.data.typical import typical_microbatch
from navil_megatron.dry_run import dry_run
from navil_megatron.dry_step import SteppedRank, step_ranks
from navil_megatron.models.connector import Connector
from navil_megatron.runtime.fake_rank import fake_rank
from navil_megatron.runtime.flop_count import FlopCount
from navil_megatron.runtime.host_waits import DeviceError, watching
from navil_megatron.runtime.live_bytes import LiveBytes
from tests.oracle import merge_sections, oracle_config
from tests.ranks import run_ranks
from tests.tolerances import PLANNED_FLOPS

ON_GPU = {
    "model": {"vision": {"num_attention_heads": 3}, "language": {"num_layers": 2, "vocab_size": 256}},
    "precision": {"type": "bf16"},
    "runtime": {"device": "cuda"},
    "data": {"seq_length": 4096},
}
OVERLAP = {"optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
RECOMPUTE = {"training": {"recompute": "selective", "recompute_modules": ("attention", "mlp", "encoder")}}
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one rank, frozen text": (1, {"training": {"phase": "s1.1"}}),
    "pp2": (2, {"parallel": {"pp": 2}, **RECOMPUTE}),
    "tp2-sp-pp2-interleaved": (
        8,
        {
            "parallel": {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
            "training": {"recompute": "full"},
            "model": {"language": {"num_layers": 4, "vocab_size": 256}},
            **OVERLAP,
        },
    ),
    "cp2": (2, {"parallel": {"cp": 2}}),
    "tp2-sp-ep2": (4, {"parallel": {"tp": 2, "ep": 2, "sequence_parallel": True}}),
    "ep2, several experts": (
        2,
        {"parallel": {"ep": 2}, "model": {"language": {"num_layers": 2, "num_experts": 4, "experts_per_token": 2}}},
    ),
}
"""Ranks, and sections of the config."""

READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "cpu": lambda x: x.cpu(),
    "copy to the host": lambda x: torch.empty(2).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "values into a mask": lambda x: x.index_put((x > 0,), torch.zeros(1, device=x.device)),
    "repeats on the device": lambda x: x.repeat_interleave((x > 0).long()),
    "a number of the host": lambda x: torch.tensor(1.0, device=x.device),
    "memory that is not pinned": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "a blocking copy": lambda x: torch.ones(2).pin_memory().to(x.device),
    "an index of the host": lambda x: x[torch.tensor([0])],
    "a list as index": lambda x: x[[0, 1]],
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
}
MIXED: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x + torch.ones(2),
    "product": lambda x: torch.ones(2, 2) @ x,
    "into": lambda x: torch.add(x, 1, out=torch.ones(2)),
    "collective": lambda x: torch.distributed.all_reduce(torch.ones(2)),
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: x + torch.tensor(1.0) + 1,
    "filled on the device": lambda x: torch.stack([torch.full((), number, device=x.device) for number in (1, 2)]),
    "pinned": lambda x: torch.ones(2).pin_memory().to(x.device, non_blocking=True),
    "a number into a mask": lambda x: x.__setitem__(x > 0, 0),
    "where": lambda x: torch.where(x > 0, x, 0.0)[torch.arange(2, device=x.device)],
    "streams": lambda x: torch.cuda.Stream().wait_stream(torch.cuda.current_stream()),
    "collective": lambda x: torch.distributed.all_reduce(x, async_op=True).wait(),
    "the host alone": lambda x: torch.ones(2)[torch.ones(2) > 0].tolist(),
}


def on_gpu(**sections: dict[str, Any]) -> NaViLConfig:
    """A tiny model on rows in which a typical sample fits."""
    return oracle_config(**merge_sections(ON_GPU, sections))


def test_a_dry_run_takes_a_step() -> None:
    (text,) = run_ranks(1, dry_run_text, on_gpu(parallel={"pp": 2}, training={"global_batch_size": 8}))
    assert "a step of the fullest rank of each stage with 3 microbatches, without a GPU" in text
    assert "no update is made with bad ones" in text


def dry_run_text(_rank: int, _world_size: int, config: NaViLConfig) -> str:
    return dry_run(config, step=True)


def test_a_step_runs_at_every_kind_of_layout() -> None:
    configs = [(gpus, on_gpu(**sections)) for gpus, sections in LAYOUTS.values()]
    (found,) = run_ranks(1, stepped, configs, timeout=600)
    for (name, (_, sections)), stages in zip(LAYOUTS.items(), found, strict=True):
        assert len(stages) == sections.get("parallel", {}).get("pp", 1), name
        for step in stages:
            assert step.peak > step.weights + step.gradients + step.optimizer, name
            waits = {wait.function for wait in step.waits} - {"_read_of_all_ranks"}
            assert bool(waits) == ("ep2" in name), name
            if "several experts" not in name:  # torch's counter does not know their product
                assert step.expected_flops == pytest.approx(step.flops, rel=PLANNED_FLOPS), name


def stepped(_rank: int, _world_size: int, configs: list[tuple[int, NaViLConfig]]) -> list[list[SteppedRank]]:
    return [list(step_ranks(config, gpus, 256, 1024)) for gpus, config in configs]


def test_what_cannot_be_stepped_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match='takes a step in BF16; set precision.type = "bf16", found "fp32"'):
        next(step_ranks(oracle_config(), 1, 256, 1024))
    with pytest.raises(UserError, match="smallest image takes more than the 64 tokens of a row; lower"):
        typical_microbatch(oracle_config(), ALONE, 256, 1024)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
    with pytest.raises(UserError, match="--step needs torch 2.14 or newer, found 2.11.0"):
        next(step_ranks(on_gpu(), 1, 256, 1024))


@pytest.mark.parametrize("spoil", ["wait", "wait in backward", "wrong device"])
def test_a_step_stops_at_the_line_that_a_hook_spoils(spoil: str) -> None:
    (message,) = run_ranks(1, spoilt, on_gpu(), spoil)
    reason = "on a tensor of the host" if spoil == "wrong device" else "the host waits for the device"
    file = "megatron/core/pipeline_parallel/schedules" if "backward" in spoil else "navil_megatron/models/navil_model"
    assert reason in message and f" at {file}.py:" in message


def spoilt(_rank: int, _world_size: int, config: NaViLConfig, spoil: str) -> str:
    """What a step says after something was added behind the connector."""

    def add(module: torch.nn.Module, _arguments: Any, output: Tensor) -> None:
        if not isinstance(module, Connector):
            return
        if spoil == "wait":
            output.sum().item()
        elif spoil == "wrong device":
            output * torch.ones(output.shape[-1], dtype=output.dtype)
        else:
            output.register_hook(lambda gradient: gradient.sum().tolist())

    register_module_forward_hook(add)
    with pytest.raises(DeviceError) as error:
        list(step_ranks(config, 1, 256, 1024))
    return str(error.value)


def test_every_kind_of_wait_and_of_mixture_is_refused() -> None:
    (found,) = run_ranks(1, refusals)
    assert {name for name, message in found.items() if "the host waits for the device" in (message or "")} == set(READS)
    assert {name for name, message in found.items() if "of the host" in (message or "")} >= {
        f"mixed: {name}" for name in MIXED
    }
    assert {name: found[f"free: {name}"] for name in FREE} == dict.fromkeys(FREE)


def refusals(_rank: int, _world_size: int) -> dict[str, str | None]:
    with fake_rank(oracle_config().parallel, 0, 1), watching():
        cases = {**READS, **{f"mixed: {n}": c for n, c in MIXED.items()}, **{f"free: {n}": c for n, c in FREE.items()}}
        return {name: _refusal(case) for name, case in cases.items()}


def _refusal(case: Callable[[Tensor], Any]) -> str | None:
    try:
        case(torch.ones(2, device="cuda"))
    except DeviceError as error:
        return str(error)
    return None


def test_bytes_and_flops_are_counted() -> None:
    (found,) = run_ranks(1, counted)
    kept, peak, end, products, attention = found
    assert (kept, peak, end) == (4096 * 2, 4096 * 2 + 3 * 512, 512)
    assert products == 2 * 64 * 32 * 64 * 3
    # Segments of 4 and 12, twice the pairs that attend, and 5 products backward for 2 forward.
    assert attention == 4 * (4**2 + 12**2) * 8 * 2 * 7 / 2


def counted(_rank: int, _world_size: int) -> tuple[int, int, int, int, int]:
    memory, flops = LiveBytes(), FlopCount()
    with fake_rank(oracle_config().parallel, 0, 1, (memory, flops)):
        left, right = (torch.empty(64, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(2))
        view = left[1:].t()
        kept = memory.now
        small = [torch.empty(3, device="cuda") for _ in range(3)]
        peak = memory.peak
        del small
        (left @ right.t()).sum().backward()
        ends = torch.tensor([0, 4, 16], dtype=torch.int32).pin_memory().to(left.device, non_blocking=True)
        query = torch.empty(16, 2, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        varlen_attn(query, query, query, ends, ends, 12, 12, window_size=(-1, 0)).sum().backward()
        del left, right, query, ends
        assert view.shape == (32, 63)
        del view
        one = torch.empty(1, device="cuda")
        end = memory.now
        del one
    return kept, peak, end, flops.products, flops.attention
