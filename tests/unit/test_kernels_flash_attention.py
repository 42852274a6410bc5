"""How torch's variable-length attention is called, on a device that poses as a GPU: what it computes is for one."""

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from navil_megatron.blueprint.segments import SegmentOrder
from navil_megatron.config.errors import UserError
from navil_megatron.config.precision import PrecisionConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.runtime import RuntimeConfig
from navil_megatron.kernels import flash_attention
from navil_megatron.kernels.provider import choose_kernels
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from tests.ranks import tiny_config

HEADS = {"grouped": (8, 2), "one each": (4, 4)}
SEGMENTS = SegmentOrder.of([5, 11, 5, 3])


class Calls(TorchDispatchMode):
    """Arguments by name of each call of torch's operators for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "torch_attn":
            names = (argument.name for argument in operator._schema.arguments)
            self.seen.append({**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return operator(*args, **(kwargs or {}))


def attend(device: str, heads: tuple[int, int], causal: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output, and query, key and value."""
    num_heads, num_groups = heads
    tokens = SEGMENTS.order.size
    query, key, value = (
        torch.empty(tokens, n, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (num_heads, num_groups, num_groups)
    )
    cu_seqlens = torch.empty(len(SEGMENTS.cu_seqlens), dtype=torch.int32, device=device)
    output = flash_attention.segment_attention(
        query,
        key,
        value,
        groups=SEGMENTS.groups,
        cu_seqlens=cu_seqlens,
        max_seqlen=SEGMENTS.longest,
        causal=causal,
    )
    return output, [query, key, value]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_torch_takes_all_segments_in_one_call(heads: str, causal: bool) -> None:
    with FakeTensorMode(), Calls() as calls:
        output, given = attend("cuda", HEADS[heads], causal)
        assert output.shape == (24, HEADS[heads][0] * 64)
        assert (output.device, output.dtype) == (given[0].device, torch.bfloat16)
    (call,) = calls.seen
    assert call["is_causal"] is causal
    # Any other window, or none, is not flash attention's alone in every version of torch.
    assert tuple(call["window_size"]) == ((-1, 0) if causal else (11, 11))
    assert call.get("enable_gqa", heads == "grouped") is (heads == "grouped")
    assert (call["max_q"], call["max_k"]) == (11, 11)


@pytest.mark.parametrize("heads", HEADS)
def test_the_backward_pass_is_one_call_too(heads: str) -> None:
    with Calls() as calls:
        output, given = attend("meta", HEADS[heads], causal=True)
        gradients = torch.autograd.grad(output, given, torch.empty_like(output))
    assert len(calls.seen) == 2
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in given]


def test_no_token_at_all() -> None:
    query, key, value = (torch.zeros(0, n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (8, 2, 2))
    nothing = SegmentOrder.of([])
    output = flash_attention.segment_attention(
        query,
        key,
        value,
        groups=nothing.groups,
        cu_seqlens=torch.from_numpy(nothing.cu_seqlens),
        max_seqlen=nothing.longest,
        causal=True,
    )
    assert output.shape == (0, 512)
    gradients = torch.autograd.grad(output, [query, key, value], torch.empty_like(output))
    assert [gradient.shape for gradient in gradients] == [(0, 8, 64), (0, 2, 64), (0, 2, 64)]


def run_with(kernels: str = "torch", precision: str = "bf16") -> NaViLConfig:
    runtime = RuntimeConfig(device="cuda", kernels=kernels)  # type: ignore[arg-type]
    return dataclasses.replace(tiny_config(), runtime=runtime, precision=PrecisionConfig(type=precision))  # type: ignore[arg-type]


def test_only_bf16_on_a_gpu_asks_for_it() -> None:
    assert choose_kernels(run_with()).segment_attention is flash_attention.segment_attention
    assert choose_kernels(run_with(precision="fp32")) is TORCH_KERNELS
    on_cpu = dataclasses.replace(run_with(), runtime=RuntimeConfig(device="cpu"))
    assert choose_kernels(on_cpu) is TORCH_KERNELS


def test_a_torch_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with pytest.raises(UserError) as caught:
        choose_kernels(run_with())
    assert str(caught.value).startswith('runtime.kernels = "torch" in BF16 needs flash attention, and torch ')
    assert "\n" not in str(caught.value)
