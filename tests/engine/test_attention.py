"""Packed attention of the engine: quietly, and set up for few longest segments."""

import warnings

import torch

from tests.engine.host import run_rehearsed


def set_up(rank: int, world_size: int) -> tuple[list[str], set[int]]:
    """Warnings, and the longest segments that kernels are asked for, of segments from 33 to 64 rows."""
    from navil_megatron.kernels.te_kernels import segment_attention
    from tests.engine.standin import calls

    calls.CALLS.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for causal in (False, True):
            for longest in (33, 40, 64):
                heads = torch.randn(longest + 8, 2, 16, dtype=torch.bfloat16)
                bounds = torch.tensor([0, 8, longest + 8], dtype=torch.int32)
                segment_attention(heads, heads, heads, groups=(), cu_seqlens=bounds, max_seqlen=longest, causal=causal)
    asked = {call.arguments["max_seqlen_q"] for call in calls.CALLS if call.name == "fused_attn_fwd"}
    return [str(warning.message) for warning in caught if "window" in str(warning.message)], asked


def test_no_warning_and_one_set_up_for_similar_rows() -> None:
    assert run_rehearsed(1, set_up) == [([], {64})]
