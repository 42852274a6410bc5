"""What a run says of itself in a line, and which records are its own."""

from pathlib import Path
from typing import Any

import pytest

from navil_megatron.config.errors import UserError
from navil_megatron.training import run_id
from navil_megatron.training.progress import describe_record
from tests.ranks import tiny_config

RECORD: dict[str, Any] = {
    "train_steps": 100,
    "loss": 3.25,
    "loss_text_only": 3.5,
    "loss_with_images": 3.0,
    "loss/web": 2.0,
    "tokens_per_second": 12_345.6,
    "peak_memory_bytes": 34_200_000_000,
    "lr": 5e-5,
    "grad_norm": 1.234,
    "skipped_steps": 0,
}


def test_a_record_is_a_line() -> None:
    expected = (
        "step 12/100  loss 3.2500 (text_only 3.5000, with_images 3.0000, loss/web 2.0000)  12,346 tokens/s  34.2 GB  "
        "lr 5e-05  grad norm 1.23  left 1:02:03"
    )
    assert describe_record(12, RECORD, 3723.4) == expected
    more = describe_record(12, RECORD | {"mfu": 0.4123, "skipped_steps": 2, "loss": float("nan")}, 1.0)
    assert "loss nan" in more and "  MFU 41.2%  " in more and "  2 refused  " in more


def settled(folder: Path, checkpoints: str, stored: str = "") -> str:
    config = tiny_config(
        logging={"directory": str(folder / "logs")}, checkpoint={"directory": str(folder / checkpoints)}
    )
    return run_id._settle(config, stored)


def test_a_folder_of_records_has_one_run(tmp_path: Path) -> None:
    first = settled(tmp_path, "a")
    # It ended before its first save, or goes on from a checkpoint, be it moved since.
    assert settled(tmp_path, "a") == first == settled(tmp_path, "moved", first)
    for checkpoints, stored in (("b", ""), ("a", "another"), ("b", "another")):
        with pytest.raises(UserError, match=f"holds the records of another run .{first}, with checkpoints in .*/a"):
            settled(tmp_path, checkpoints, stored)
    (tmp_path / "logs" / run_id.FILE).unlink()
    assert settled(tmp_path, "b", "another") == "another"  # records that are older than ids, or a new folder
    (tmp_path / "logs" / run_id.FILE).write_text("[")
    with pytest.raises(UserError, match="is damaged"):
        settled(tmp_path, "b")
