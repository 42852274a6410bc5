"""The peers of the benchmarks compute what ours computes; what they count is what they say."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tools.bench.profile_shares import summarize

SMALL = {"hidden": 64, "ffn": 96, "heads": 4, "groups": 2, "head_dim": 16, "vocabulary": 256, "vision": 48}


def one_of_two_fails(rank: int, world_size: int, folder: str) -> int:
    from tools.bench import gpu

    def measured(size: str) -> dict:
        return {"speed": 1 / (size == "good")}

    gpu.BENCHMARKS = {"speed": lambda scale: [partial(measured, size=size) for size in ("bad", "good")]}
    return gpu.main(["--rehearse", "--out", folder])


def test_a_measurement_that_fails_leaves_its_traceback_and_the_others(tmp_path: Path) -> None:
    assert run_ranks(1, one_of_two_fails, str(tmp_path)) == [1]
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert report["results"] == {"speed": [{"speed": 1}]}
    (error,) = report["errors"]
    assert (error["benchmark"], error["size"]) == ("speed", "bad") and "ZeroDivisionError" in error["traceback"]


def compare(rank: int, world_size: int, swapped: str | None) -> dict:
    """Ours against every peer, of which one may take the modalities for each other."""
    from tools.bench import experts
    from tools.bench.small_run import mixed_row, small_config

    if swapped is not None:
        right = getattr(experts, swapped)
        setattr(experts, swapped, lambda is_visual, *rest: right(~is_visual, *rest))
    config = small_config(layers=1, tokens=256, precision="fp32", shape=SMALL)
    return experts.compare(config, mixed_row(config, grid=(16, 16)), rounds=1)


def test_peers_of_the_experts_give_our_outputs_and_gradients() -> None:
    (found,) = run_ranks(1, compare, None)
    assert {part: set(peers) for part, peers in found.items()} == {
        "feed_forward": {"mask", "index", "moe_layer"},
        "qkv_projection": {"mask", "index", "released"},
        "decoder": {"mask", "index", "released", "moe_layer"},
    }


@pytest.mark.parametrize("way", ["by_mask", "by_index", "everywhere", "RouterByModality"])
def test_a_peer_that_computes_something_else_stops_the_bench(way: str) -> None:
    with pytest.raises(AssertionError, match="a relative distance of"):
        run_ranks(1, compare, way)


def host_time(rank: int, world_size: int) -> dict:
    from tools.bench import host_time
    from tools.bench.small_run import small_config

    config = small_config(layers=1, tokens=2048, precision="fp32", shape=SMALL)
    return host_time.measure(config, Namespace(rows=2, rounds=1))


def test_the_model_inputs_of_a_step_are_mostly_its_pixels() -> None:
    (found,) = run_ranks(1, host_time)
    pixels = found["patches"] * 3 * 16 * 16
    assert 2 * 1024 < found["patches"] < 2 * 2048 * 4
    assert pixels < found["uploaded_bytes"] < 1.1 * pixels
    assert min(found["loader_threads_ms"], *found["training_thread_ms"].values()) > 0


def test_a_profile_counts_overlapping_kernels_once() -> None:
    import tools.bench.gpu  # noqa: F401  puts its neighbours on the path

    spans = [("sm90_xmma_gemm_bf16", 0.0, 10.0), ("ncclDevKernel_AllGather", 5.0, 15.0), ("index_select", 16.0, 17.0)]
    found = summarize(spans, wall=20.0)
    assert found["shares"] == {
        "communication": 0.5,
        "attention": 0.0,
        "gemm": 0.5,
        "gathers": 0.05,
        "optimizer": 0.0,
        "memcpy": 0.0,
        "norms_elementwise": 0.0,
        "idle": 0.2,
    }
    assert [kernel["name"] for kernel in found["longest_kernels"]][2] == "index_select"
