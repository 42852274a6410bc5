"""The converter's engine: any chunks in, the same bytes out for any number of processes, and every byte compared."""

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.files.checksums import CHECKSUMS_FILE
from navil_megatron.hf import safetensors_writer
from navil_megatron.hf.checkpoint.reader import CheckpointReader
from navil_megatron.hf.checkpoint.writer import COMMON_STATE_KEY, FORMAT, CheckpointWriter
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.hf_parameters import Slot, hf_shapes
from navil_megatron.hf.ingest import convert_from_hf
from navil_megatron.hf.inspect import PARTS, inspect
from navil_megatron.hf.jobs import export_jobs, ingest_jobs
from navil_megatron.hf.safetensors_io import INDEX_FILE, TensorFolder
from navil_megatron.hf.safetensors_writer import SafetensorsWriter
from navil_megatron.hf.verify import same_bits
from navil_megatron.verbs.arguments import file_size
from tests.unit.hf_examples import FAMILIES, random_hf_tensors, tiny_model, write_checkpoint
from tests.whole_checkpoint import hf_to_mcore, read_tensors, write_tensors

ROOT = Path(__file__).resolve().parent.parent.parent


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shares and files even for a tiny model."""
    monkeypatch.setattr(safetensors_writer, "_SHARE_BYTES", 100_000)
    monkeypatch.setattr(CheckpointWriter.__init__, "__defaults__", (150_000,))


@pytest.mark.parametrize("family", FAMILIES)
def test_jobs_pickle_and_name_every_slot_once(family: str) -> None:
    model = tiny_model(family)
    for jobs in (export_jobs(model), ingest_jobs(model)):
        again = pickle.loads(pickle.dumps(jobs))
        assert [(job.sources, job.targets) for job in again] == [(job.sources, job.targets) for job in jobs]
        for side in ("sources", "targets"):
            names = [slot.name for job in jobs for slot in getattr(job, side)]
            assert len(names) == len(set(names))
    assert {slot.key: slot.shape for job in export_jobs(model) for slot in job.targets} == hf_shapes(model)


def test_every_number_of_processes_writes_the_same_bytes(tmp_path: Path, small_shares: None) -> None:
    write_checkpoint(tmp_path / "checkpoint", tiny_model())
    for number in (1, 3):
        told: list[tuple[int, int]] = []
        convert_to_hf(
            tmp_path / "checkpoint",
            tmp_path / f"hf{number}",
            num_processes=number,
            max_file_bytes=100_000,
            on_progress=lambda done, total: told.append((done, total)),  # noqa: B023
        )
        assert told[-1][0] == told[-1][1] == 2 * sum(t.nbytes for t in TensorFolder(tmp_path / f"hf{number}").values())
        convert_from_hf(tmp_path / f"hf{number}", tmp_path / f"again{number}", num_processes=number)
    assert len(list((tmp_path / "hf1").glob("*.safetensors"))) > 3
    assert len(list((tmp_path / "again1").glob("*.distcp"))) > 3
    assert hashes(tmp_path / "hf1") == hashes(tmp_path / "hf3")
    assert hashes(tmp_path / "again1") == hashes(tmp_path / "again3")


def test_files_are_what_transformers_writes(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "checkpoint", tiny_model())
    files = convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf", max_file_bytes=100_000)["files"]
    *files, _ = files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "hf" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(index["weight_map"]) == sorted(tensors)
    read = {}
    for file in files:
        content = load_file(tmp_path / "hf" / file)
        assert sum(tensor.nbytes for tensor in content.values()) <= 100_000 or len(content) == 1
        assert {index["weight_map"][key] for key in content} == {file}
        read |= content
        with safe_open(tmp_path / "hf" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert read.keys() == tensors.keys()
    assert all(same_bits(read[key], tensors[key]) for key in read)


def test_types_may_differ_between_parameters(tmp_path: Path) -> None:
    """An odd number of 2-byte numbers before 4-byte ones must not leave the latter unaligned."""
    slots = [(Slot("a", (3,)), torch.bfloat16), (Slot("b", (5,)), torch.float32), (Slot("c", ()), torch.float16)]
    tensors = {slot: torch.randn(slot.shape).to(dtype) for slot, dtype in slots}
    writer = SafetensorsWriter(tmp_path, slots, 10**9)
    writer.write(0, tensors.items())
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        TensorFolder(tmp_path)  # the header comes last
    writer.finish([None])
    header = (tmp_path / "model.safetensors").read_bytes()[8:].partition(b"}}")[0] + b"}}"
    offsets = {key: entry["data_offsets"] for key, entry in json.loads(header).items() if key != "__metadata__"}
    assert all(offsets[slot.key][0] % dtype.itemsize == 0 for slot, dtype in slots)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(same_bits(loaded[slot.key], tensor) for slot, tensor in tensors.items())
    assert all(same_bits(TensorFolder(tmp_path)[slot.key], tensor) for slot, tensor in tensors.items())


def test_mixed_types_survive_the_chain(tmp_path: Path) -> None:
    model = tiny_model("internlm2")
    tensors = random_hf_tensors(model)
    for key in tensors:
        if "norm" in key:
            tensors[key] = tensors[key].bfloat16()
    write_checkpoint(tmp_path / "checkpoint", model)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    (tmp_path / "hf" / CHECKSUMS_FILE).unlink()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    convert_from_hf(tmp_path / "hf", tmp_path / "mixed")
    convert_to_hf(tmp_path / "mixed", tmp_path / "again")
    again = TensorFolder(tmp_path / "again")
    assert all(same_bits(again[key], tensors[key]) for key in tensors)


def test_a_tensor_larger_than_a_file_is_cut_into_blocks_of_rows(tmp_path: Path) -> None:
    tensors = {Slot("table", (100, 7)): torch.randn(100, 7), Slot("stack", (40, 3), 1, 2): torch.randn(40, 3)}
    tensors[Slot("stack", (40, 3), 0, 2)] = torch.randn(40, 3)
    writer = CheckpointWriter(tmp_path, share_bytes=200)
    writer.finish([writer.write(0, tensors.items())])
    reader = CheckpointReader(tmp_path)
    assert len(reader.tensors["table"].chunks) > 10
    assert all(torch.equal(reader.read(slot), tensor) for slot, tensor in tensors.items())
    by_torch = {"table": torch.zeros(100, 7), "stack": torch.zeros(2, 40, 3)}
    distributed_checkpoint.load(by_torch, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(by_torch["table"], tensors[Slot("table", (100, 7))])
    assert torch.equal(by_torch["stack"][1], tensors[Slot("stack", (40, 3), 1, 2)])


def test_reads_whole_stacks_that_torch_saved(tmp_path: Path) -> None:
    """Checkpoints of earlier versions hold all layers in one chunk; only the rows of one layer are read."""
    stack, strided = torch.randn(4, 6, 8), torch.randn(6, 4)
    state = {"stack": stack, "scalar": torch.tensor(2.5), "strided": strided, "empty": torch.zeros(0, 3)}
    distributed_checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(tmp_path))
    reader = CheckpointReader(tmp_path)
    for layer in range(4):
        assert torch.equal(reader.read(Slot("stack", (6, 8), layer, 4)), stack[layer])
    assert all(torch.equal(reader.read(Slot(key, tuple(value.shape))), value) for key, value in state.items())


def test_reads_a_chunk_that_is_not_row_major(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    writer = CheckpointWriter(tmp_path)
    writer.finish([writer.write(0, [(Slot("weight", (4, 6)), weight)])])
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == "weight")
    with (tmp_path / place.relative_path).open("wb") as file:
        torch.save(torch.cat([torch.zeros(1), weight.t().flatten()])[1:].view(6, 4).t(), file)
        place.length = file.tell()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert torch.equal(CheckpointReader(tmp_path).read(Slot("weight", (4, 6))), weight)


def test_what_core_calls_its_files_is_what_we_write(tmp_path: Path) -> None:
    assert ShardedObject("common_state", None, (1,), (0,)).unique_key == COMMON_STATE_KEY
    save_config(CheckpointingConfig("torch_dist", 1), str(tmp_path))
    assert json.loads((tmp_path / "metadata.json").read_text()) == FORMAT


@pytest.mark.parametrize("where", ["checkpoint", "folder", "training checkpoint", "stack of layers"])
def test_a_flipped_bit_is_named(tmp_path: Path, where: str) -> None:
    """A stack of layers is one chunk, of which a conversion reads the rows of one layer at a time."""
    write_checkpoint(tmp_path / "saved", tiny_model())
    convert_to_hf(tmp_path / "saved", tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "again")
    file = {
        "checkpoint": tmp_path / "again" / "__0_0.distcp",
        "folder": tmp_path / "hf" / "model.safetensors",
    }.get(where, tmp_path / "saved" / "__0_0.distcp")
    key = "decoder.layers.mlp.linear_fc2.text.weight" if where == "stack of layers" else "output_layer.weight"
    tensor = read_tensors(tmp_path / "saved")[key]
    content = bytearray(file.read_bytes())
    place = content.find(tensor.numpy().tobytes())
    content[place + 1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"(output_layer\.weight|lm_head\.weight|fc2.*\[\d\]) in .*(checksum|CRC)"
    ) as error:
        if where == "folder":
            convert_from_hf(tmp_path / "hf", tmp_path / "target")
        else:
            convert_to_hf(file.parent, tmp_path / "target")
    assert "\n" not in str(error.value)
    assert file.name in str(error.value)
    assert not list(tmp_path.glob("target*"))


def test_damaged_description_of_a_tensor(tmp_path: Path) -> None:
    """Its pickle still makes sense, but is not what was saved."""
    write_checkpoint(tmp_path / "saved", tiny_model())
    path = tmp_path / "saved" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    place = content.find(b"\x89ccollections")  # requires_grad
    content[place] = 0x88
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"has a damaged data\.pkl"):
        read_tensors(tmp_path / "saved")


def _flip_a_number(content: bytearray) -> None:
    content[-5] ^= 64


def _turn_a_matrix(content: bytearray) -> None:
    place = content.find(b'"shape":[48,56]')
    content[place : place + 15] = b'"shape":[56,48]'


@pytest.mark.parametrize("damage", [_flip_a_number, _turn_a_matrix])
def test_what_reads_back_different_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage) -> None:
    """The file changes between the write and the check, as on a failing disk."""
    write_checkpoint(tmp_path / "checkpoint", tiny_model())
    finish = SafetensorsWriter.finish

    def finish_and_break(self: SafetensorsWriter, places) -> list[str]:
        files = finish(self, places)
        path = self.folder / files[0]
        content = bytearray(path.read_bytes())
        damage(content)
        path.write_bytes(content)
        return files

    monkeypatch.setattr(SafetensorsWriter, "finish", finish_and_break)
    with pytest.raises(OSError, match="read.? back different"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))


def test_verify_compares_any_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write_checkpoint(tmp_path / "one", tiny_model())
    convert_to_hf(tmp_path / "one", tmp_path / "hf")
    convert_to_hf(tmp_path / "one", tmp_path / "bf16", dtype=torch.bfloat16)

    def verify(one: str, other: str) -> tuple[int, dict]:
        status = main(["convert", "verify", str(tmp_path / one), str(tmp_path / other), "--json"])
        return status, json.loads(capsys.readouterr().out)

    for pair in (("one", "hf"), ("hf", "one"), ("one", "one"), ("hf", "hf")):
        status, report = verify(*pair)
        assert (status, report["num_equal"], report["equal"]) == (0, len(tensors), True)
    status, report = verify("one", "bf16")
    assert (status, report["num_equal_after_cast"], report["num_different"]) == (1, len(tensors), 0)
    assert report["equal_after_casting_to"] == ["bfloat16"]

    model = dataclasses.replace(tiny_model(), connector_norm_epsilon=1e-6)
    changed = hf_to_mcore(tensors, model)
    changed["connector.norm.bias"][0] += 0.5
    changed["decoder.layers.mlp.linear_fc2.visual.weight"][1, 2, 3] = float("nan")
    other = tmp_path / "other"
    other.mkdir()

    write_tensors(other, changed, model, {})
    status, report = verify("hf", "other")
    assert status == 1
    assert [entry["key"] for entry in report["differences"]] == [
        "mlp1.0.bias",
        "language_model.model.layers.1.mlp_ve.down_proj.weight",
    ]
    assert report["differences"][0]["max_abs_difference"] == pytest.approx(0.5)
    assert report["config_differences"] == ["model.connector_norm_epsilon is 1e-05 and 1e-06"]
    assert (report["finite"], report["not_finite"]) == (False, [report["differences"][1]["key"]])
    status, report = verify("other", "other")
    assert (status, report["equal"], report["finite"]) == (1, True, False)
    assert main(["convert", "verify", str(tmp_path / "hf"), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_and_not_exported(
    tmp_path: Path, bad: float, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    tensors = hf_to_mcore(random_hf_tensors(model), model)
    tensors["decoder.layers.mlp.linear_fc2.visual.weight"][1, 2, 3] = bad
    tensors["connector.norm.bias"][0] = bad
    (tmp_path / "one").mkdir()
    write_tensors(tmp_path / "one", tensors, model, {})
    assert main(["convert", "to-hf", str(tmp_path / "one"), str(tmp_path / "hf")]) == 2
    told = capsys.readouterr().err
    assert "not finite: mlp1.0.bias, language_model.model.layers.1.mlp_ve.down_proj.weight;" in told
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_counts_by_part(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write_checkpoint(tmp_path / "checkpoint", tiny_model(family))
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    one, other = inspect(tmp_path / "checkpoint"), inspect(tmp_path / "hf")
    assert one["parts"] == other["parts"]
    assert one["num_parameters"] == other["num_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert one["parts"]["visual_experts"]["num_parameters"] > 0
    assert set(one["parts"]) <= set(PARTS) - {"unknown"}
    assert (one["kind"], other["kind"]) == ("checkpoint", "NaViL folder")
    assert (one["has_checksums"], other["has_checksums"]) == (False, True)
    for name in ("checkpoint", "hf"):
        assert main(["convert", "inspect", str(tmp_path / name)]) == 0
        assert f"family {family}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("300MB", 3 * 10**8), ("2GiB", 2 * 2**30), ("1 kb", 1000)]
)
def test_sizes_are_written_as_transformers_does(text: str, size: int) -> None:
    assert file_size(text) == size


def test_bad_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("5 bananas", "0GB", "-1GB", "", "GB", "5"):
        with pytest.raises(SystemExit):
            main(["convert", "to-hf", "a", "b", "--max-part-size", text])
        assert "expected" in capsys.readouterr().err


def test_converter_of_a_checkout(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "checkpoint", tiny_model())
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
    done = subprocess.run(
        [*command, "to-hf", "checkpoint", "hf", "--json", "--max-part-size", "200KB"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["verified"] is True
    assert report["num_hf_tensors"] == len(tensors)
    assert "error" not in done.stderr


def test_file_size_of_a_checkpoint_is_about_a_gigabyte() -> None:
    assert CheckpointWriter(Path()).share_bytes == 1_000_000_000
