"""The conversion bench measures what a training run saves: its chunks are core's, rank by rank."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.files.checkpoint_metadata import read_metadata
from navil_megatron.hf.compare import compare_weights
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.hf_parameters import hf_parameters
from navil_megatron.hf.verify import read_model_config
from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from tests.oracle import oracle_config
from tests.ranks import run_ranks, start_session

SCRIPT = Path(__file__).resolve().parent.parent.parent / "tools" / "bench" / "convert.py"
LAYOUTS = {"one rank": (1, 1, 1), "tp2-pp2-ep2": (2, 2, 2)}


def load_bench():
    spec = importlib.util.spec_from_file_location("bench_convert", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(rank: int, world_size: int, folder: str, sections: dict) -> None:
    config = oracle_config(**sections, checkpoint={"directory": folder, "keep_last": 9})
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model)
        CheckpointManager(config, session).save(0, model, build_optimizer(config, chunks, session), {"step": 0})


def saved_by_core(layout: str, folder: Path) -> Path:
    tp, pp, ep = LAYOUTS[layout]
    parallel = {"tp": tp, "sequence_parallel": tp > 1, "pp": pp, "ep": ep}
    run_ranks(tp * pp * ep, save, str(folder), {"parallel": parallel}, timeout=200)
    return folder / "step_00000000"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_are_those_of_a_real_save(layout: str, tmp_path: Path) -> None:
    bench = load_bench()
    checkpoint = saved_by_core(layout, tmp_path / "run")
    stored = read_metadata(checkpoint).weights
    real = {
        (int(chunk.place.file.removeprefix("__").partition("_")[0]), key, chunk.offsets, chunk.sizes)
        for key, tensor in stored.items()
        for chunk in tensor.chunks
    }
    made = {
        (rank, parameter.key, offsets, sizes)
        for rank, parameter, offsets, sizes in bench.chunks(read_model_config(checkpoint), *LAYOUTS[layout])
    }
    assert made == real


def test_a_layout_changes_no_byte_of_the_folder(tmp_path: Path) -> None:
    """The same weights, saved by core at one rank and by ranks of every kind, are one folder."""
    checkpoints = [saved_by_core(layout, tmp_path / layout) for layout in LAYOUTS]
    for checkpoint in checkpoints:
        config = json.loads((checkpoint / "navil_config.json").read_text())
        config["data"]["tokenizer"] = None
        (checkpoint / "navil_config.json").write_text(json.dumps(config))
        convert_to_hf(checkpoint, checkpoint.parent / "hf")
    one, many = ((checkpoint.parent / "hf" / "model.safetensors").read_bytes() for checkpoint in checkpoints)
    assert one == many
    assert compare_weights(*checkpoints)["equal"]


def test_sizes_are_those_of_the_real_model() -> None:
    bench = load_bench()
    count = sum(found.parameter.numel for found in hf_parameters(bench.NAVIL_2B))
    assert count == 4_040_921_024  # the key list of the published sizes


@pytest.mark.slow
def test_bench_runs_from_a_checkout(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--scale", "0.01", "--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for name in ("to_hf", "to_hf_tp2_pp2_ep2", "from_hf"):
        assert result[name]["ratio_vs_cp"] > 0
        assert 0.1 < result[name]["peak_rss_gb"] < 10
    assert not list(tmp_path.iterdir())
