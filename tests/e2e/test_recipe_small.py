"""The small recipe's driver, whole but tiny: the start is a random Llama. What it promises must hold all the same."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.quickstart.report import last_record, read_metrics
from examples.recipe_small.build_data import QUESTIONS, texts
from tests.e2e.runs import error_lines, start

STEPS = {"s1.1": 40, "s1.2": 3, "s2": 3}
NUM_HELD_OUT = 4


def save_tiny_llm(folder: Path) -> Path:
    """A random Llama of two layers and a tokenizer that knows turns."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts()["heldout"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def begin(folder: Path, llm: Path) -> Any:
    options = {"--folder": folder, "--llm": llm, "--num-train": 60, "--num-heldout": NUM_HELD_OUT, "--num-emoji": 4}
    words = [str(word) for pair in options.items() for word in pair]
    return start("examples/recipe_small/run.py", *words, "--steps", *map(str, STEPS.values()))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, float]]:
    """Its folder, what it printed, and when the files were written that were there when it was stopped."""
    folder = tmp_path_factory.mktemp("recipe")
    llm = save_tiny_llm(folder / "llm")
    process = begin(folder / "run", llm)
    metrics = folder / "run" / "s1.1" / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while last_record(metrics, "train") is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed + stderr
    written = {str(path): path.stat().st_mtime for path in finished(folder / "run")}
    process = begin(folder / "run", llm)
    printed, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, printed + stderr
    assert error_lines(stderr) == []
    return folder / "run", printed, written


def finished(folder: Path) -> list[Path]:
    """What is done before the first phase trains."""
    return [path for part in ("data", "shards", "weights", "start") for path in (folder / part).rglob("*.[tjsi]*")]


def test_it_goes_on_where_it_was_stopped(recipe: tuple[Path, str, dict[str, float]]) -> None:
    folder, _, written = recipe
    kept = {path: mtime for path, mtime in written.items() if not path.endswith("captions.jsonl")}
    assert len(kept) > 30
    assert {path: Path(path).stat().st_mtime for path in kept} == kept
    for phase, steps in STEPS.items():
        train = [
            record for record in read_metrics(folder / phase / "logs" / "metrics.jsonl") if record["kind"] == "train"
        ]
        assert [record["step"] for record in train] == list(range(1, steps + 1)), phase


def test_text_is_untouched_by_the_first_phase(recipe: tuple[Path, str, dict[str, float]]) -> None:
    folder, printed, _ = recipe
    found = {name: json.loads((folder / name / "text.json").read_text()) for name in ("start", *STEPS)}
    assert found["start"]["logits"] == found["s1.1"]["logits"]
    assert len({one["logits"] for one in found.values()}) == len(STEPS)
    assert found["start"]["perplexity"] == found["s1.1"]["perplexity"]
    # The peer has the same weights; only the order of sums differs.
    assert found["start"]["largest_difference"] < 1e-4
    assert "bit-identical to those before" in printed


def test_figures(recipe: tuple[Path, str, dict[str, float]]) -> None:
    folder, printed, _ = recipe
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert list(summary["answers"]) == ["caption", *QUESTIONS]
    for score in (*summary["answers"].values(), *summary["answers_swapped"].values(), *summary["captions"].values()):
        assert score["num"] == NUM_HELD_OUT
        assert 0 <= score["exact"] <= 1
        assert 0 < score["most_frequent_answer"] <= 1
    assert {name: phase["train_steps"] for name, phase in summary["phases"].items()} == STEPS
    assert [len(phase["heldout"]) for phase in summary["phases"].values()] == [1, 2, 3]
    assert all(phase["perplexity"] > 1 for phase in summary["phases"].values())
    assert "pydoc_data.topics" in printed
    assert "OpenMoji" in printed
    with Image.open(folder / "recipe.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24) or []) > 50


def test_other_options_are_refused(recipe: tuple[Path, str, dict[str, float]]) -> None:
    folder, _, _ = recipe
    process = start("examples/recipe_small/run.py", "--folder", str(folder), "--num-emoji", "4")
    _, stderr = process.communicate()
    assert process.returncode == 1
    (line,) = error_lines(stderr)
    assert "num_train 60" in line and "--fresh" in line
