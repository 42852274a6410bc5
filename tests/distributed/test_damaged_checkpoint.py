"""A checkpoint with a bad byte is never restored: it is refused by name, or the run goes on from the one before it."""

import io
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.config.errors import DamagedError, UserError
from navil_megatron.files.archive import find_numbers
from navil_megatron.files.checkpoint_metadata import read_metadata
from navil_megatron.models.build import build_model
from navil_megatron.runtime.session import Session
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.start import start_run
from navil_megatron.training.step import train_step
from tests.distributed.test_layouts import BATCH
from tests.oracle import global_batch, merge_sections, oracle_config
from tests.ranks import run_ranks, start_session
from tests.whole import slices_of

WEIGHT = "decoder.layers.mlp.linear_fc1.text.weight"


def places(folder: Path, key: str) -> tuple[str, int]:
    """The file of an entry, and a byte that counts: in the middle of a tensor's last numbers, or an object's."""
    contents = read_metadata(folder)
    if key in contents.objects:
        place = contents.objects[key]
        content = (folder / place.file).read_bytes()[place.start : place.start + place.length]
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {archive.read(record): record.header_offset for record in archive.infolist()}
        most = max(records, key=len)
        return place.file, place.start + content.index(most, records[most]) + len(most) // 2
    chunk = contents.tensors[key].chunks[-1]
    numbers = find_numbers(folder, chunk, contents.tensors[key].dtype)
    return chunk.place.file, numbers.position + numbers.num_bytes // 2


def flip_bit(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 0x40]))


@contextmanager
def damaged(session: Session, folder: Path, key: str) -> Iterator[str]:
    """Rank 0 flips one bit, and back at the end; gives the file."""
    name, position = places(folder, key)
    torch.distributed.barrier()
    if session.is_main:
        flip_bit(folder / name, position)
    torch.distributed.barrier()
    yield name
    torch.distributed.barrier()
    if session.is_main:
        flip_bit(folder / name, position)
    torch.distributed.barrier()


class Training:
    """A run of the real model, its two checkpoints, and what a new start of it restores."""

    def __init__(self, sections: dict, session: Session, fall_back: bool = False) -> None:
        self.config = oracle_config(**merge_sections(sections, {"checkpoint": {"fall_back": fall_back}}))
        self.session = session
        self.model = build_model(self.config, session.groups, session.device)
        self.chunks = wrap_ddp(self.config, session, self.model)
        self.optimizer = build_optimizer(self.config, self.chunks, session)
        self.manager = CheckpointManager(self.config, session)

    def step_and_save(self, step: int) -> None:
        batch = global_batch(self.config, BATCH, self.session)
        share = len(batch) // self.session.groups.dp.size()
        first = self.session.groups.dp.rank() * share
        train_step(self.config, self.session, self.chunks, self.optimizer, batch[first : first + share], lr=1e-2)
        self.manager.save(step, self.model, self.optimizer, {"step": step})

    def restore(self) -> dict | None:
        return self.manager.restore_latest(self.model, self.optimizer)

    def start(self) -> int:
        """As a run starts; the step that it goes on from."""
        run = start_run(self.config, self.session, self.manager)
        self.model, self.chunks, self.optimizer = run.model, run.chunks, run.optimizer
        return run.state.step


def _flip_every_kind(rank: int, world_size: int, sections: dict) -> None:
    """Every kind of entry in turn: the same line on every rank, though one alone reads it; then the way back."""
    with start_session(rank, world_size, oracle_config(**sections)) as session:
        run = Training(sections, session)
        run.step_and_save(1)
        first = slices_of(run.model)
        run.step_and_save(2)
        second = slices_of(run.model)
        folder = run.manager.latest()
        assert folder is not None and folder.name == "step_00000002"
        objects = read_metadata(folder).objects
        keys = [WEIGHT, *(f"optimizer.state.{state}.{WEIGHT}" for state in ("param", "exp_avg", "exp_avg_sq"))]
        keys += ["common_state/shard_0_1", next(key for key in objects if key.startswith("rng_state"))]
        again = Training(sections, session)
        for key in keys:
            with damaged(session, folder, key) as file, pytest.raises(DamagedError) as caught:
                again.restore()
            assert f"checkpoint {folder} is damaged: {key} in {file} " in str(caught.value)
            assert "\n" not in str(caught.value) and "checkpoint.fall_back = true" in str(caught.value)
        assert again.restore() == {"step": 2}
        assert _equal(slices_of(again.model), second)

        patient = Training(sections, session, fall_back=True)
        with damaged(session, folder, keys[2]), warnings() as said:
            assert patient.start() == 1
            aside = folder.with_name("step_00000002.damaged")
            assert len(said) == 1 and keys[2] in said[0] and aside.name in said[0], said
            assert aside.is_dir() and not folder.exists()
            torch.distributed.barrier()
            if session.is_main:
                aside.rename(folder)
            torch.distributed.barrier()
        assert _equal(slices_of(patient.model), first)
        # The step that was lost comes out the same, moments included, and is saved under its name.
        torch.distributed.barrier()
        if session.is_main:
            folder.rename(aside)
        torch.distributed.barrier()
        patient.step_and_save(2)
        assert folder.is_dir() and _equal(slices_of(patient.model), second)


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What the package warns of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("navil_megatron").addHandler(handler)
    yield said
    logging.getLogger("navil_megatron").removeHandler(handler)


def _equal(found: list, expected: list) -> bool:
    return all(torch.equal(a[-1], b[-1]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("ranks", "parallel"), [(2, {"pp": 2}), (2, {}), (2, {"tp": 2})], ids=["pp2", "dp2", "tp2"])
def test_no_bad_byte_is_restored(ranks: int, parallel: dict, tmp_path: Path) -> None:
    run_ranks(ranks, _flip_every_kind, {"parallel": parallel, "checkpoint": {"directory": str(tmp_path)}})


def _nothing_whole_is_left(rank: int, world_size: int, sections: dict) -> None:
    with start_session(rank, world_size, oracle_config(**sections)) as session:
        run = Training(sections, session, fall_back=True)
        run.step_and_save(1)
        run.step_and_save(2)
        folder = run.manager.directory / "step_00000002"
        (folder / ".metadata").unlink()
        (folder.with_name("step_00000001") / "navil_config.json").write_text("{")
        with pytest.raises(UserError, match="no whole checkpoint is left in"):
            run.restore()
        names = sorted(path.name for path in folder.parent.iterdir())
        assert names == ["step_00000001.damaged", "step_00000002.damaged"]
        run.step_and_save(3)
        foreign = run.manager.directory / "step_00000003" / "common.pt"
        torch.save({"step": 7}, foreign)
        with pytest.raises(UserError, match="holds common.pt, which no checkpoint of ours does"):
            run.restore()
        foreign.unlink()
        with warnings() as said:
            assert run.restore() == {"step": 3}
        assert not said
        torch.serialization.set_crc32_options(False)
        run.step_and_save(4)
        with warnings() as said:
            assert run.restore() == {"step": 4}
        assert len(said) == 1 and "entries without a checksum, which could not be checked" in said[0]


def test_a_run_never_starts_anew_because_its_checkpoints_are_damaged(tmp_path: Path) -> None:
    run_ranks(1, _nothing_whole_is_left, {"checkpoint": {"directory": str(tmp_path)}})
