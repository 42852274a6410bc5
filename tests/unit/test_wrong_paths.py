"""Targets that cannot be written and stores that cannot be asked: one line, the right cause, exit code 2."""

from pathlib import Path

import pytest

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.data.shards.shard_files import expand_shards
from navil_megatron.files.disk_space import require_space


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/proc/made", "/proc/made cannot be written (No such file or directory); give another folder"),
        ("{0}/corpus.txt/made", "corpus.txt/made cannot be written (File exists); give another folder"),
    ],
)
def test_a_target_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, expected: str
) -> None:
    (tmp_path / "corpus.txt").write_text("a red apple\n")
    assert main(["tokenizer", target.format(tmp_path), "--train", str(tmp_path / "corpus.txt"), "--vocab", "260"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(expected)


def test_a_file_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "plot", "--output", "/proc/made.svg"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: [Errno 2] No such file or directory: '/proc/made.svg'"


def test_a_place_without_files_is_no_full_disk() -> None:
    with pytest.raises(UserError, match="/proc/made lies in /proc, where no files can be; choose a folder on a disk"):
        require_space(Path("/proc/made"), 1)


def test_a_store_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(
        UserError, match=r"shards 's3://bucket/\*.tar' cannot be listed \(Unable to locate credentials\)"
    ):
        expand_shards(["s3://bucket/*.tar"])
