"""Names from elsewhere reach a terminal and a log spelled out: they begin no line, and steer nothing."""

import json
import logging
from dataclasses import replace
from pathlib import Path

from navil_megatron.config.errors import ConfigError, UserError, describe
from navil_megatron.data.types import FailedSample
from navil_megatron.runtime.logs import configure_logging
from navil_megatron.training.metrics import MetricsLog
from tests.ranks import run_ranks, start_session, tiny_config
from tests.unit.shard_examples import index_tar, picture, small_tokenizer, write_tar

NAME = "\x1b[2J\x1b[31m\u202ex\nerror: step 9 hung"


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    for error in (UserError(f"shard {NAME} is gone"), ConfigError([f"{NAME} is no setting"])):
        line = describe(error)
        assert "\n" not in line and line.isprintable() and "\\x1b[2J" in line


def _log_a_failure(rank: int, world_size: int, folder: str, key: str) -> None:
    config = tiny_config()
    config = replace(config, logging=replace(config.logging, directory=folder))
    with start_session(rank, world_size, config) as session, (Path(folder) / "log").open("w") as stream:
        configure_logging(rank, world_size)
        (handler,) = logging.getLogger("navil_megatron").handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(stream)
        log = MetricsLog(config, session, "abc")
        log.write_failures(3, [_OneFailure(key)])  # type: ignore[list-item]
        log.close()


class _OneFailure:
    """All of a microbatch that the log reads."""

    def __init__(self, key: str) -> None:
        self.failures = (FailedSample(0, "s.tar", key, "text differs from the index"),)


def test_a_member_name_of_a_tar_reaches_the_log_spelled_out(tmp_path: Path) -> None:
    members = [(f"{NAME}.png", picture(40, 50)), (f"{NAME}.txt", b"one")]
    source, _, _ = index_tar(write_tar(tmp_path / "x.tar", members), small_tokenizer(tmp_path / "tokenizer"))
    key = source.key(0)
    assert key == NAME
    run_ranks(1, _log_a_failure, str(tmp_path), key)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.isprintable() and "\\x1b[2J" in line and "step 3: s.tar: " in line
    assert json.loads((tmp_path / "failed_samples.jsonl").read_text())["key"] == NAME
