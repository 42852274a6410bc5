"""All segments in one flash call against one call for each length: outputs and gradients in BF16, and no wait."""

import pytest
import torch

from navil_megatron.blueprint.segments import SegmentOrder
from navil_megatron.kernels import flash_attention, torch_kernels
from tests.engine.runs import distance
from tests.gpu.test_no_syncs import waiting_is_an_error
from tests.tolerances import BF16_KERNELS

pytestmark = pytest.mark.gpu
LENGTHS = {
    "mixed": [700, 3, 64, 64, 129, 1, 700, 256],
    "alike": [64] * 40,
    "one": [1500],
}
HEADS = {"decoder-2b": (16, 8, 128), "decoder-9b": (32, 8, 128), "encoder": (23, 23, 64)}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_equals_a_call_for_each_length(lengths: str, heads: str, causal: bool) -> None:
    segments = SegmentOrder.of(LENGTHS[lengths])
    num_heads, num_groups, head_dim = HEADS[heads]
    generator = torch.Generator("cuda").manual_seed(0)

    def random(number: int) -> torch.Tensor:
        shape = (segments.order.size, number, head_dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()

    given = [random(n) for n in (num_heads, num_groups, num_groups)]
    wanted = random(num_heads).detach().flatten(1)
    plan = {
        "groups": segments.groups,
        "cu_seqlens": torch.from_numpy(segments.cu_seqlens).cuda(),
        "max_seqlen": segments.longest,
        "causal": causal,
    }

    def run(attention: object) -> list[torch.Tensor]:
        output = attention(*given, **plan)  # type: ignore[operator]
        return [output, *torch.autograd.grad(output, given, wanted)]

    expected = run(torch_kernels.segment_attention)
    run(flash_attention.segment_attention)  # loads kernels
    with waiting_is_an_error():
        found = run(flash_attention.segment_attention)
    far = [distance(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    assert all(value <= BF16_KERNELS for value in far), far
