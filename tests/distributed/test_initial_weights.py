"""Weights that came from a Hugging Face folder start a run at any layout, bit for bit: the door in is the door out."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf.hf_config import hf_config_from_model
from navil_megatron.hf.ingest import convert_from_hf
from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from tests.ranks import run_ranks, start_session, tiny_config
from tests.unit.hf_examples import random_hf_tensors, tiny_model
from tests.whole import assemble, read_whole, slices_of

LAYOUTS = {
    "one-rank": (1, {}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp2-interleaved": (2, {"pp": 2, "vpp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
}


def four_layers(family: str) -> ModelConfig:
    """Enough depth for two chunks on each of two stages."""
    model = tiny_model(family)
    return dataclasses.replace(model, language=dataclasses.replace(model.language, num_layers=4))


def loaded_slices(rank: int, world_size: int, family: str, parallel: dict, weights: str) -> list:
    """What each rank holds after loading, as slices of the whole tensors."""
    config = tiny_config(model=four_layers(family), parallel=parallel)
    with start_session(rank, world_size, config) as session:
        chunks = build_model(config, session.groups, session.device)
        CheckpointManager(config, session).load_weights(Path(weights), chunks)
        return slices_of(chunks)


@pytest.mark.parametrize("family", ["qwen3", "internlm2"])
def test_converted_weights_load_at_every_layout(family: str, tmp_path: Path) -> None:
    """megatron-core asks for more than tensors: an export without its empty extra state once failed to load."""
    model = four_layers(family)
    folder, weights = tmp_path / "hf", tmp_path / "weights"
    folder.mkdir()
    save_file(random_hf_tensors(model), folder / "model.safetensors")
    config = hf_config_from_model(model, dtype="float32", token_ids={}, image_settings={})
    (folder / "config.json").write_text(json.dumps(config))
    convert_from_hf(folder, weights)
    expected = read_whole(weights)
    for name, (world_size, parallel) in LAYOUTS.items():
        ranks = run_ranks(world_size, loaded_slices, family, parallel, str(weights))
        whole = assemble([piece for rank in ranks for piece in rank])
        assert whole.keys() == expected.keys(), name
        for key, tensor in expected.items():
            assert torch.equal(whole[key], tensor), (name, key)


def _deleted_meanwhile(rank: int, world_size: int, weights: str) -> str:
    """What is said where the run that owns a checkpoint deletes it as soon as its first number is read."""
    folder = Path(weights)

    def delete(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith(".distcp") and folder.exists():
            shutil.rmtree(folder.rename(f"{folder}.partial"))

    sys.addaudithook(delete)
    config = tiny_config(model=four_layers("qwen3"))
    with start_session(rank, world_size, config) as session, pytest.raises(UserError) as caught:
        CheckpointManager(config, session).load_weights(folder, build_model(config, session.groups, session.device))
    return str(caught.value)


def test_weights_that_are_deleted_while_they_are_read_are_not_called_damaged(tmp_path: Path) -> None:
    run_ranks(1, _saved, str(tmp_path))
    (line,) = run_ranks(1, _deleted_meanwhile, str(tmp_path / "step_00000001"))
    assert line.startswith(f"checkpoint {tmp_path}/step_00000001 was deleted while it was read")


def _saved(rank: int, world_size: int, folder: str) -> None:
    config = tiny_config(model=four_layers("qwen3"), checkpoint={"directory": folder})
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        CheckpointManager(config, session).save(1, chunks, build_optimizer(config, chunks, session), {"step": 1})
