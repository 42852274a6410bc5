"""The quickstart's driver, whole but short: every step leaves what it promises. The thresholds need a full run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.e2e.runs import error_lines, start

NUM_STEPS, NUM_HELD_OUT = 12, 12
SHARES = ("exact_match", "exact_match_swapped", "padding_share", "data_wait_share")
POSITIVE = (
    "loss",
    "heldout_loss",
    "heldout_loss_swapped",
    "train_seconds",
    "total_seconds",
    "tokens_per_second",
    "samples_per_second",
)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Its folder and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    options = {"--folder": folder, "--num-train": 300, "--num-heldout": NUM_HELD_OUT, "--steps": NUM_STEPS}
    words = [str(word) for pair in options.items() for word in pair]
    process = start("examples/quickstart/run.py", *words)
    printed, stderr = process.communicate()
    assert process.returncode == 0, printed + stderr
    assert error_lines(stderr) == []
    # The log is readable from top to bottom: nothing of other libraries, no title that is cut off.
    foreign = re.compile(r"Warning|deprecat|site-packages|Loading weights|\[transformers\]|\[W\d|…")
    assert [line for line in (printed + stderr).splitlines() if foreign.search(line)] == []
    return folder, printed


def test_figures(quickstart: tuple[Path, str]) -> None:
    folder, printed = quickstart
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert all(0 <= summary[name] <= 1 for name in SHARES), summary
    assert all(0 < summary[name] < float("inf") for name in POSITIVE), summary
    assert 1 <= summary["resumed_at_step"] < NUM_STEPS == summary["train_steps"]
    assert summary["heldout_samples"] == NUM_HELD_OUT
    assert "OpenMoji" in summary["attribution"]
    assert "OpenMoji" in printed
    assert "held-out loss, images swapped" in printed
    records = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    # Stopped and resumed: every step once, in order, and the loss falls across the stop.
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, NUM_STEPS + 1))
    assert train[-1]["loss"] < train[0]["loss"]
    assert list((folder / "logs" / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("name", ["curves.png", "captions.png"])
def test_pictures(quickstart: tuple[Path, str], name: str) -> None:
    with Image.open(quickstart[0] / name) as picture:
        picture.load()
        assert 800 <= picture.width <= 4000
        assert 400 <= picture.height <= 4000
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24) or []) > 50


def test_exported_folder(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder / "hf", trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    processor = AutoProcessor.from_pretrained(folder / "hf", trust_remote_code=True)
    inputs = processor(images=[Image.new("RGB", (128, 64), "white")], text="<image>")
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] <= inputs["input_ids"].shape[1] + 3
    captions = json.loads((folder / "captions.json").read_text())["samples"]
    assert len(captions) == NUM_HELD_OUT
    assert all(sample["caption"] for sample in captions)
