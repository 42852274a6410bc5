"""Conversion between checkpoint and Hugging Face folders: nothing lost, nothing invented, nothing half written."""

import dataclasses
import json
import queue
import re
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import load_file, save_file

from navil_megatron.blueprint.parameters import checkpoint_shapes
from navil_megatron.config.errors import UserError
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.hf_parameters import hf_parameters, hf_shapes
from navil_megatron.hf.ingest import convert_from_hf
from navil_megatron.hf.jobs import cut
from navil_megatron.hf.safetensors_io import INDEX_FILE, TensorFolder
from navil_megatron.hf.verify import same_bits
from tests.ranks import run_ranks, start_session
from tests.unit.hf_examples import (
    FAMILIES,
    random_hf_tensors,
    tiny_model,
    tiny_tokenizer,
    with_tokenizer,
    write_checkpoint,
)
from tests.whole_checkpoint import hf_to_mcore, mcore_to_hf, read_tensors, read_whole_checkpoint, write_tensors


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_table_names_every_key_once(family: str) -> None:
    model = tiny_model(family, qkv_bias=True, norm="layernorm")
    found = hf_parameters(model)
    hf_keys = [slot.key for parameter in found for _, theirs in parameter.slots(model) for slot in theirs]
    assert len(hf_keys) == len(set(hf_keys)) == len(hf_shapes(model))
    assert len(found) == len(checkpoint_shapes(model))


def test_depth_zero_and_tied_embeddings_drop_their_rows() -> None:
    model = tiny_model(num_layers=0)
    assert not any(key.startswith("vision_encoder.layers") for key in checkpoint_shapes(model))
    tied = dataclasses.replace(model, language=dataclasses.replace(model.language, tied_embeddings=True))
    assert checkpoint_shapes(model).keys() - checkpoint_shapes(tied).keys() == {"output_layer.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_in_memory_round_trip(family: str) -> None:
    model = tiny_model(family, norm="layernorm", qkv_bias=True)
    tensors = random_hf_tensors(model)
    whole = hf_to_mcore(tensors, model)
    assert {key: tuple(tensor.shape) for key, tensor in whole.items()} == checkpoint_shapes(model)
    assert same(dict(mcore_to_hf(whole, model)), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_round_trip_with_tokenizer(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    model = with_tokenizer(tiny_model(family), tokenizer)
    data = {"tokenizer": str(tmp_path / "tokenizer"), "min_image_pixels": 1024, "multi_scale": False}
    tensors = write_checkpoint(tmp_path / "one", model, dtype, data)
    report = convert_to_hf(tmp_path / "one", tmp_path / "hf")
    assert report["types"] == [str(dtype).removeprefix("torch.")]
    assert report["num_hf_tensors"] == len(tensors)
    assert report["notes"] == []
    assert same(dict(TensorFolder(tmp_path / "hf")), tensors)
    convert_from_hf(tmp_path / "hf", tmp_path / "two")
    (first_model, first), (second_model, second) = (read_whole_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert first_model == second_model == model
    assert same(first, second)
    again = convert_to_hf(tmp_path / "two", tmp_path / "hf2")
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {path.name for path in (tmp_path / "hf2").iterdir()}
    assert {"README.md", "tokenizer.json", "modeling_navil_chat.py", "generation_config.json"} <= files
    # The card tells the digest of the config that the checkpoint was saved with, and the two hold different ones.
    for name in files - {"README.md"}:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "hf2" / name).read_bytes(), name
    assert again["tokenizer"] == str(tmp_path / "hf")


def test_dtype_casts(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "checkpoint", tiny_model())
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert same(dict(TensorFolder(tmp_path / "hf")), {key: tensor.bfloat16() for key, tensor in tensors.items()})


@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
def test_every_tensor_problem_in_one_error_and_nothing_written(tmp_path: Path, direction: str) -> None:
    model = tiny_model()
    tensors = write_checkpoint(tmp_path / "checkpoint", model)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    target = tmp_path / "target"
    if direction == "from-hf":
        path = tmp_path / "hf" / "model.safetensors"
        broken = load_file(path)
        del broken["mlp1.1.weight"]
        broken["mlp1.0.bias"] = broken["mlp1.0.bias"][:-1].clone()
        broken["mlp1.3.bias"] = broken["mlp1.3.bias"].to(torch.int8)
        broken["extra.weight"] = torch.zeros(2)
        layer = "vision_model.encoder.layers.1.ls1"
        broken[layer] = broken[layer].half()
        save_file(broken, path)
        convert = lambda: convert_from_hf(tmp_path / "hf", target)  # noqa: E731
        names = ["mlp1.1.weight", "mlp1.0.bias", "mlp1.3.bias has type int8", "extra.weight", "ls1 have several types"]
    else:
        whole = hf_to_mcore(tensors, model)
        del whole["connector.linear_fc1.weight"]
        whole["connector.norm.bias"] = whole["connector.norm.bias"][:-1]
        whole["extra.weight"] = torch.zeros(2)
        other = tmp_path / "broken"
        other.mkdir()
        write_tensors(other, whole, model, {})
        convert = lambda: convert_to_hf(other, target)  # noqa: E731
        names = ["connector.linear_fc1.weight", "connector.norm.bias", "extra.weight"]
    with pytest.raises(UserError) as error:
        convert()
    for name in names:
        assert name in str(error.value)
    assert not list(tmp_path.glob("target*"))


def test_wrong_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "tokenizer")
    write_checkpoint(tmp_path / "checkpoint", tiny_model())
    with pytest.raises(UserError, match="is not the model's: </box> is"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf", tokenizer=tmp_path)
    assert not (tmp_path / "hf").exists()


def test_tokenizer_that_moved_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", tiny_model(), data={"tokenizer": "/nowhere/tokenizer"})
    with pytest.raises(UserError, match=r"/nowhere/tokenizer has no tokenizer\.json there"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")


def test_existing_target_is_kept_and_stale_partial_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", tiny_model())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert (tmp_path / "hf" / "mine.txt").read_text() == "keep"
    stale = tmp_path / "new.partial"
    stale.mkdir()
    (stale / "left.txt").write_text("over")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "new")
    assert not stale.exists()
    assert not (tmp_path / "new" / "left.txt").exists()


def test_newest_complete_checkpoint_of_a_run_is_taken(tmp_path: Path) -> None:
    for step in (90, 100):
        write_checkpoint(tmp_path / f"step_{step:08d}", tiny_model())
    (tmp_path / "step_00000110.partial").mkdir()
    report = convert_to_hf(tmp_path, tmp_path / "hf", verify=False)
    assert report["checkpoint"].endswith("step_00000100")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "navil_config.json").unlink(), "holds no checkpoint"),
        (lambda folder: (folder / "navil_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "metadata.json").unlink(), "not a complete megatron-core checkpoint"),
        (lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04junk"), "is damaged"),
        (lambda folder: next(folder.glob("*.distcp")).write_bytes(b"short"), "is damaged"),
    ],
)
def test_damaged_checkpoint_is_one_line(tmp_path: Path, damage, message: str) -> None:
    write_checkpoint(tmp_path / "checkpoint", tiny_model())
    damage(tmp_path / "checkpoint")
    with pytest.raises(UserError, match=message) as error:
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "hf").exists()


def test_damaged_hf_folder_is_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", tiny_model())
    folder = tmp_path / "hf"
    files = convert_to_hf(tmp_path / "checkpoint", folder, max_file_bytes=100_000)["files"]
    assert files[-1] == INDEX_FILE
    whole = (folder / files[0]).read_bytes()
    index = (folder / INDEX_FILE).read_text()

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            convert_from_hf(folder, tmp_path / "again")
        assert not list(tmp_path.glob("again*"))

    (folder / files[0]).write_bytes(whole[: len(whole) // 2])
    refused("cannot be read as safetensors")
    (folder / files[0]).unlink()
    refused(re.escape(f"lacks {files[0]}"))
    (folder / INDEX_FILE).write_text(index.replace(files[0], "../secret.safetensors"))
    refused("expected file names inside the folder")
    (folder / INDEX_FILE).write_text("[]")
    refused("is not a safetensors index")
    (folder / INDEX_FILE).unlink()
    refused("has neither")
    (folder / "config.json").write_text("nonsense")
    refused("cannot be read as JSON")


def test_pieces_keep_order_and_size() -> None:
    pieces = cut({"a": 4, "b": 4, "c": 9, "d": 1, "e": 7}, 8)
    assert pieces == [["a", "b"], ["c"], ["d", "e"]]


def test_code_in_a_source_folder_is_never_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", tiny_model())
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    for path in (tmp_path / "hf").glob("*.py"):
        path.write_text("raise SystemExit('was run')")
    convert_from_hf(tmp_path / "hf", tmp_path / "again")


KEY, SHAPE = "decoder.layers.mlp.linear_fc2.text.weight", (2, 48, 56)


def _piece(rank: int, data: torch.Tensor) -> ShardedTensor:
    """Layer 0 and 1 on a leading axis, the last axis split over two ranks."""
    return ShardedTensor.from_rank_offsets(KEY, data, (0, rank % 2, 2), (2, rank // 2, 2), prepend_axis_num=1)


def _load_piece(rank: int, world_size: int, folder: str) -> torch.Tensor:
    with start_session(rank, world_size):
        wanted = {"weight": _piece(rank, torch.zeros(48, 28))}
        return dist_checkpointing.load(wanted, folder)["weight"]


def _save_piece(rank: int, world_size: int, folder: str, whole: torch.Tensor) -> None:
    with start_session(rank, world_size):
        state = {"model": {"weight": _piece(rank, whole[rank % 2, :, 28 * (rank // 2) : 28 * (rank // 2 + 1)].clone())}}
        moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg", torch.ones(3), (0, rank, world_size))
        filesystem_async._results_queue = queue.Queue()
        dist_checkpointing.save(state | {"moment": moment, "training": {"step": 3}}, folder)


def test_ranks_read_what_one_process_wrote(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "checkpoint", tiny_model())
    whole = hf_to_mcore(tensors, tiny_model())[KEY]
    for rank, piece in enumerate(run_ranks(4, _load_piece, str(tmp_path / "checkpoint"))):
        assert torch.equal(piece, whole[rank % 2, :, 28 * (rank // 2) : 28 * (rank // 2 + 1)])


def test_one_process_reads_what_ranks_wrote(tmp_path: Path) -> None:
    whole = torch.randn(SHAPE)
    run_ranks(4, _save_piece, str(tmp_path), whole)
    found = read_tensors(tmp_path)
    assert found.keys() == {KEY}
    assert torch.equal(found[KEY], whole)
