"""A run's folders belong to one run: a second start is refused and changes nothing; a killed owner is replaced."""

import os
import signal
from pathlib import Path

from navil_megatron.config.errors import EXIT_CODE
from tests.e2e.runs import World, error_lines, make_run, pretrain_in_rank, records, saved_steps, start, write_toml
from tests.ranks import run_ranks

OWN = "import sys, time; from pathlib import Path; from navil_megatron.files.lock import owned\n"
OWN += "with owned(Path(sys.argv[1]), 'the run'): print('owned', flush=True); time.sleep(600)"


def test_a_second_run_is_refused_until_the_first_is_gone(world: World, tmp_path: Path) -> None:
    config = make_run(world, tmp_path, training={"train_steps": 3})
    path = write_toml(config, tmp_path / "run.toml")
    for name in ("logging", "checkpoint"):
        folder = Path(getattr(config, name).directory)
        first = start("-c", OWN, str(folder / ".lock"))
        try:
            assert first.stdout is not None and first.stdout.readline() == "owned\n"
            ((code, stderr),) = run_ranks(1, pretrain_in_rank, path)
        finally:
            os.kill(first.pid, signal.SIGKILL)  # and what it held stays behind
            first.communicate()
        (line,) = error_lines(stderr)
        assert code == EXIT_CODE
        assert line.startswith(
            f"error: {name}.directory {folder} is being written by another process; wait for it, stop"
        )
        assert f"process {first.pid} on " in line
        assert list(folder.iterdir()) == [folder / ".lock"]
    ((code, stderr),) = run_ranks(1, pretrain_in_rank, path)
    assert code == 0, stderr
    assert "taking over checkpoint.directory" in stderr and len(records(config, "train")) == 3
    assert saved_steps(config) == ["step_00000003"]
