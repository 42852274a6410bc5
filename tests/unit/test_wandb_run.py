"""Records at Weights & Biases: one run however often it is started, and no run that ends because of the service."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from navil_megatron.config.errors import UserError
from navil_megatron.training import wandb_run
from navil_megatron.training.metrics import MetricsLog
from navil_megatron.training.wandb_run import ID_FILE, check_wandb
from tests.ranks import tiny_config


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key and no settings of whoever runs the test, and nobody to talk to; each test reads them anew."""
    for name in ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield
    wandb.teardown()


def config_in(folder: Path, **logging: Any):
    return tiny_config(
        logging={"directory": str(folder), "wandb_project": "navil", **logging},
        runtime=dataclasses.replace(tiny_config().runtime, collective_timeout_seconds=4),
    )


def write(config, step: int) -> None:
    log = MetricsLog(config, SimpleNamespace(is_main=True, world_size=1), "abc")  # type: ignore[arg-type]
    log.write("train", step, {"loss": 0.0625 * step, "text_tokens_per_second": 7.5})
    log.write("feature_scale", step, {})
    log.close()


def sent(folder: Path) -> list[bytes]:
    """What W&B keeps of each start, oldest first; numbers are text in it. Its process must have written all."""
    wandb.teardown()
    return [file.read_bytes() for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def test_a_run_that_is_started_again_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_in(tmp_path)
    check_wandb(config.logging)
    write(config, 3)
    name = (tmp_path / ID_FILE).read_text().strip()
    write(config, 5)
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    for content, loss in zip(sent(tmp_path), (b"0.1875", b"0.3125"), strict=True):
        assert b"train/loss" in content and loss in content and b"global_batch_size" in content
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["train", "train"]


def test_a_service_that_is_away_leaves_records_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    config = config_in(tmp_path)
    check_wandb(config.logging)
    write(config, 3)
    (content,) = sent(tmp_path)
    assert b"0.1875" in content
    (said,) = [record.message for record in caplog.records if record.name == wandb_run.__name__]
    assert said.startswith("W&B cannot be reached") and "wandb sync" in said and "\n" not in said


def test_without_a_key_one_line_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no API key: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"):
        check_wandb(config_in(tmp_path).logging)
    check_wandb(config_in(tmp_path, wandb_project=None).logging)


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs wandb, which is not installed: pip install 'navil_megatron\[wandb\]'"):
        check_wandb(config_in(tmp_path).logging)
