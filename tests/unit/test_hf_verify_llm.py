"""A bare LLM against the NaViL that was made of it: its text experts are compared, and nothing else."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from navil_megatron.cli import main
from tests.unit.data_examples import example_tokenizer
from tests.unit.llm_examples import VISION, save_random_llm


@pytest.mark.parametrize("family", ["llama", "internlm2"])
def test_verify_compares_an_llm_with_the_navil_made_of_it(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random_llm(family, 5, tmp_path / "llm")
    example_tokenizer(tmp_path / "llm")
    llm, weights = str(tmp_path / "llm"), str(tmp_path / "weights")
    sizes = [f"model.vision.{name}={value}" for name, value in VISION.items()]
    assert main(["convert", "from-hf", llm, weights, *sizes]) == 0
    assert main(["convert", "to-hf", weights, str(tmp_path / "exported")]) == 0
    for one, other in ((llm, weights), (str(tmp_path / "exported"), llm)):
        capsys.readouterr()
        assert main(["convert", "verify", one, other, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["equal"] and report["compared"].startswith("what an LLM has")
        tensors = load_file(tmp_path / "llm" / "model.safetensors")
        assert report["num_equal"] >= len(tensors) - 1 > 8  # a tied head may be stored, or not
    changed = next(key for key in tensors if key.endswith("norm.weight") and "layers.0" in key)
    tensors[changed][0] += 1
    save_file(tensors, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", "verify", llm, weights, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [entry["key"] for entry in report["differences"]] == [f"language_model.{changed}"]
