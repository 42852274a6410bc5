"""Host-side plans: segments, modality order, who encodes which image; and rows that follow one."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.blueprint.flops import attending_pairs, encoding_cost
from navil_megatron.blueprint.modality_order import plan_modality_order
from navil_megatron.blueprint.segments import SegmentOrder, inverse_order
from navil_megatron.blueprint.vision_plan import assign_images, block_order, plan_vision
from navil_megatron.config.vision import VisionConfig
from navil_megatron.layers.reorder import Reorder

ENCODER = VisionConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=2)
WINDOWED = VisionConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=2, token_order="window", window_size=4
)
LENGTHS = st.lists(st.integers(0, 9), max_size=12)
GRIDS = st.lists(
    st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)).map(lambda g: (g[0], 2 * g[1], 2 * g[2])),
    max_size=8,
)


@settings(deadline=None)
@given(LENGTHS)
def test_segment_groups_cover_every_token_once_and_keep_segments_whole(lengths: list[int]) -> None:
    segments = SegmentOrder.of(lengths)
    order, groups = segments.order, segments.groups
    assert segments.cu_seqlens.tolist() == [0, *np.cumsum(sorted(length for length in lengths if length))]
    assert segments.longest == max(lengths, default=0)
    assert sorted(order.tolist()) == list(range(sum(lengths)))
    assert [g.start for g in groups] == [0, *(g.end for g in groups)][: len(groups)]
    starts = set(np.cumsum([0, *lengths]).tolist())
    for group in groups:
        for segment in range(group.num_segments):
            tokens = order[group.start + segment * group.length :][: group.length]
            assert tokens[0] in starts and (np.diff(tokens) == 1).all()


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_modality_order_is_a_permutation_that_attention_undoes(lengths: list[int], seed: int) -> None:
    mask = np.random.default_rng(seed).random(sum(lengths)) < 0.5
    order = plan_modality_order(mask, lengths)
    text, visual = np.split(order.rows, [order.num_text_tokens])
    assert not mask[text].any() and mask[visual].all()
    assert (np.diff(text) > 0).all() and (np.diff(visual) > 0).all()
    causal_in_attention_order = order.rows[order.to_attention]
    assert (causal_in_attention_order == SegmentOrder.of(lengths).order).all()
    assert (order.row_of_token[order.rows] == np.arange(mask.size)).all() and order.is_here.all()


@settings(deadline=None)
@given(
    st.sampled_from([2, 3, 4]),
    st.lists(st.booleans(), min_size=1, max_size=8),
    st.lists(st.integers(1, 9), max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_context_parallel_ranks_hold_every_token_once_and_as_many_of_each_modality(
    cp_size: int, kinds: list[bool], cuts: list[int], seed: int
) -> None:
    mask = np.random.default_rng(seed).permutation(np.repeat(kinds, cp_size))
    lengths = np.diff([0, *sorted({min(cut, mask.size) for cut in np.cumsum(cuts, dtype=int)}), mask.size]).tolist()
    orders = [plan_modality_order(mask, lengths, cp_size, cp_rank=rank) for rank in range(cp_size)]
    for order in orders:
        text, visual = np.split(order.rows, [order.num_text_tokens])
        assert not mask[text].any() and mask[visual].all()
        assert (np.flatnonzero(order.is_here) == np.sort(order.rows)).all()
        assert (order.row_of_token[order.rows] == np.arange(order.rows.size)).all()
    rows = np.concatenate([order.rows for order in orders])
    assert sorted(rows.tolist()) == list(range(mask.size))
    assert (rows[orders[0].to_attention] == SegmentOrder.of(lengths).order).all()


def test_modalities_that_do_not_divide_over_context_parallel_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 text and 1 visual tokens do not divide over 2 ranks"):
        plan_modality_order(np.array([False, False, True, False]), [4], 2)


def test_segments_that_do_not_cover_the_row_are_refused() -> None:
    with pytest.raises(ValueError, match="segments hold 3 tokens, the row holds 4"):
        plan_modality_order(np.zeros(4, dtype=bool), [1, 2])


@settings(deadline=None)
@given(GRIDS, st.integers(1, 4), st.sampled_from([ENCODER, WINDOWED]))
def test_every_patch_is_encoded_once_and_every_token_found(grids: list, num_ranks: int, config: VisionConfig) -> None:
    plans = [plan_vision(grids, config, rank, num_ranks) for rank in range(num_ranks)]
    num_patches = [t * h * w for t, h, w in grids]
    of_plans = [np.flatnonzero(np.repeat(plan.is_mine, num_patches))[plan.patch_index] for plan in plans]
    patches = np.concatenate(of_plans)
    assert sorted(patches.tolist()) == list(range(sum(t * h * w for t, h, w in grids)))
    # The first patch of the block behind each gathered feature, in the place where the gather puts it.
    gathered = np.full(num_ranks * plans[0].gathered_tokens, -1)
    for rank, plan in enumerate(plans):
        gathered[rank * plan.gathered_tokens :][: len(of_plans[rank]) // 4] = of_plans[rank][::4]
        assert plan.images.cu_seqlens[-1] == plan.windows.cu_seqlens[-1] == plan.patch_index.size
        assert plan.images.is_in_place
    start, expected = 0, []
    for t, h, w in grids:
        blocks = block_order(h // 2, w // 2, config)[0]
        for _ in range(t):
            expected += (start + 4 * blocks).tolist()
            start += h * w
    assert gathered[plans[0].feature_index].tolist() == expected


@given(GRIDS, st.sampled_from([None, (), (1,)]))
def test_pairs_that_attend_are_those_of_the_plans_segments(grids: list, full: tuple[int, ...] | None) -> None:
    encoder = dataclasses.replace(WINDOWED, full_attention_layers=full)
    plan = plan_vision(grids, encoder, 0, 1)
    whole, windows = (
        sum(group.num_segments * group.length**2 for group in order.groups) for order in (plan.images, plan.windows)
    )
    num_full = 2 if full is None else len(full)
    found = [frames * attending_pairs(rows, columns, encoder) for frames, rows, columns in grids]
    assert sum(found) == num_full * whole + (2 - num_full) * windows
    frames, rows, columns = np.array(grids, dtype=np.int64).reshape(-1, 3).T
    assert (frames * attending_pairs(rows, columns, encoder)).tolist() == found


def test_raster_order_keeps_reading_order_and_windows_do_not() -> None:
    assert block_order(3, 3, ENCODER)[0].tolist() == list(range(9))
    order, windows = block_order(3, 3, WINDOWED)
    assert order.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert windows == [4, 2, 2, 1]


def test_images_are_balanced_by_cost() -> None:
    random = np.random.default_rng(0)
    grids = [(1, 2 * int(h), 2 * int(w)) for h, w in random.integers(4, 32, (64, 2))]
    costs = [encoding_cost(grid, ENCODER) for grid in grids]
    ranks = np.asarray(assign_images(costs, 8))
    loads = np.asarray([sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == r) for r in range(8)])
    assert loads.max() / loads.mean() < 1.05


def test_reordered_rows_have_the_gradient_of_a_gather() -> None:
    order = np.random.default_rng(0).permutation(12)
    index, inverse = torch.from_numpy(order), torch.from_numpy(inverse_order(order))
    rows, wanted = torch.randn(12, 3, requires_grad=True), torch.randn(12, 3)
    Reorder.apply(rows, index, inverse).backward(wanted)
    (expected,) = torch.autograd.grad(rows.index_select(0, index), rows, wanted)
    assert torch.equal(rows.grad, expected)
    assert torch.equal(Reorder.apply(rows, index, inverse), rows[index])
