"""A start from a pretrained LLM: what is copied, what is drawn, what is refused, and the tokenizer that grows along."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from navil_megatron.blueprint.parameters import checkpoint_shapes
from navil_megatron.config.errors import UserError
from navil_megatron.config.load import config_to_dict
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.data.tokenizer import SampleTokenizer, load_tokenizer
from navil_megatron.hf.exported.tokenizer_files import extend_tokenizer
from navil_megatron.hf.jobs import export_jobs
from navil_megatron.hf.llm.start import (
    ignored_llm_tensors,
    is_bare_llm,
    llm_start_jobs,
    model_config_for_llm,
)
from tests.unit.hf_examples import FAMILIES
from tests.unit.llm_examples import LLAMA3_ROPE, VISION, run_in_memory, save_random_llm, sources_of

IDS = tuple(range(200, 212))


class Folder:
    """A saved LLM and starts from it."""

    def __init__(self, family: str, path: Path, seed: int = 0) -> None:
        save_random_llm(family, seed, path)
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.tensors = load_file(path / "model.safetensors")

    def model(self, **language: Any) -> ModelConfig:
        return model_config_for_llm(self.config, {"vision": VISION, "language": language}, IDS)

    def sources(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        return sources_of(llm_start_jobs(self.config, model, seed=0, dtype=torch.float32, stored=self.tensors))

    def start(self, model: ModelConfig, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        jobs = llm_start_jobs(self.config, model, seed=seed, dtype=dtype, stored=self.tensors)
        random.Random(seed).shuffle(jobs)
        return run_in_memory(pickle.loads(pickle.dumps(jobs)), self.tensors)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(request.param, tmp_path / "llm")


def test_text_experts_equal_the_llm_bit_for_bit(folder: Folder) -> None:
    model = folder.model()
    whole = folder.start(model)
    seen = set()
    for job in export_jobs(model):
        (slot,), keys = job.sources, [target.key.removeprefix("language_model.") for target in job.targets]
        if ".visual." in slot.key or keys[0] == job.targets[0].key:
            continue
        value = whole[slot.key] if slot.layer is None else whole[slot.key][slot.layer]
        for key, tensor in zip(keys, job.function((value,)), strict=True):
            expected = folder.tensors[key]
            assert torch.equal(tensor[: len(expected)], expected), key
            seen.add(key)
    assert seen == {key for key in folder.tensors if key != "lm_head.weight" or not model.language.tied_embeddings}


def test_visual_experts_are_copies(folder: Folder) -> None:
    whole = folder.start(folder.model())
    pairs = [(key, key.replace(".visual.", ".text.")) for key in whole if ".visual." in key]
    assert pairs
    for visual, text in pairs:
        assert torch.equal(whole[visual], whole[text]), visual


def test_visual_experts_drawn_at_random_follow_the_rule_of_new_models(folder: Folder) -> None:
    whole = folder.start(folder.model(visual_expert_init="random", init_std=0.7))
    for key in (key for key in whole if ".visual." in key):
        if key.endswith(".bias"):
            assert not whole[key].any(), key
        elif "layernorm" in key:
            assert (whole[key] == 1).all(), key
        else:
            assert 0.5 < whole[key].std() < 0.9, key
            assert len(whole[key].unique()) > 0.9 * whole[key].numel(), key


def test_encoder_connector_and_special_tokens_follow_the_rule_of_new_models(folder: Folder) -> None:
    whole = folder.start(folder.model(init_std=0.7))
    assert (whole["vision_encoder.layers.layer_scale1"] == 0.1).all()
    assert (whole["vision_encoder.layers.norm1.weight"] == 1).all()
    assert not whole["connector.linear_fc1.bias"].any()
    assert 0.015 < whole["vision_encoder.layers.linear_fc1.weight"].std() < 0.025
    assert 0.4 < whole["special_token_embedding.weight"].std() < 1.0
    first, second = whole["vision_encoder.layers.linear_fc1.weight"]
    assert not torch.equal(first, second)


def test_what_is_drawn_depends_on_the_seed_alone(folder: Folder) -> None:
    model = folder.model(visual_expert_init="random")
    one, again, other = folder.start(model, 1), folder.start(model, 1), folder.start(model, 2)
    assert all(torch.equal(one[key], again[key]) for key in one)
    drawn = {key for key in one if not torch.equal(one[key], other[key])}
    assert "special_token_embedding.weight" in drawn
    assert "decoder.layers.mlp.linear_fc2.visual.weight" in drawn
    assert not any(".text." in key or key.startswith("embedding") for key in drawn)


def test_new_rows_are_the_mean_of_the_old(folder: Folder) -> None:
    whole = folder.start(folder.model())
    table_ = whole["embedding.word_embeddings.weight"]
    stored = folder.tensors["model.tok_embeddings.weight" if folder.config["model_type"] == "internlm2" else EMBEDDING]
    assert len(table_) == 212
    torch.testing.assert_close(table_[len(stored) :], stored.mean(0).expand(212 - len(stored), -1))


EMBEDDING = "model.embed_tokens.weight"


def test_vocabulary_with_room_does_not_grow_and_a_larger_one_is_granted(tmp_path: Path) -> None:
    folder = Folder("qwen3", tmp_path / "llm")
    inside = tuple(range(12))
    rows = folder.config["vocab_size"]
    fits = model_config_for_llm(folder.config, {"vision": VISION}, inside)
    assert fits.language.vocab_size == rows
    wide = model_config_for_llm(folder.config, {"vision": VISION, "language": {"vocab_size": 256}}, inside)
    assert wide.language.vocab_size == 256
    with pytest.raises(UserError, match=r"vocab_size is 100, but 212 rows are needed"):
        folder.model(vocab_size=100)


def test_composed_output_starts_as_the_text_experts_function(tmp_path: Path) -> None:
    folder = Folder("internlm2", tmp_path / "llm")
    assert not folder.model().language.composed_visual_output_projection
    model = folder.model(composed_visual_output_projection=True)
    whole = folder.start(model)
    assert {key: tuple(value.shape) for key, value in whole.items()} == checkpoint_shapes(model)
    for projection in whole["decoder.layers.self_attention.linear_proj.visual.weight"]:
        assert torch.equal(projection, torch.eye(model.language.hidden_size))


def test_every_tensor_gets_the_wanted_type(folder: Folder) -> None:
    whole = folder.start(folder.model(visual_expert_init="random"), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}


def test_expected_tensors_are_the_folders(folder: Folder) -> None:
    assert folder.sources(folder.model()) == {key: tuple(tensor.shape) for key, tensor in folder.tensors.items()}


def test_rotary_buffers_are_left_unread() -> None:
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"}
    assert ignored_llm_tensors({*buffers, "model.norm.weight", "model.layers.0.inv_freq"}) == buffers


def test_stored_tied_head_is_accepted_only_if_it_is_the_table(tmp_path: Path) -> None:
    folder = tied_llama(tmp_path)
    folder.tensors["lm_head.weight"] = folder.tensors[EMBEDDING].clone()
    model = folder.model()
    assert folder.sources(model)["lm_head.weight"]
    folder.start(model)
    folder.tensors["lm_head.weight"][3, 1] += 1
    with pytest.raises(UserError, match="says tie_word_embeddings, but its folder holds an LM head that differs"):
        folder.start(model)


def tied_llama(tmp_path: Path) -> Folder:
    for seed in range(20):
        folder = Folder("llama", tmp_path / f"llm-{seed}", seed)
        if folder.config["tie_word_embeddings"]:
            return folder
    raise AssertionError("no tied model in 20")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True, supported: False"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, supported: False"),
        ("internlm2", {"bias": True}, "bias is True, supported: False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window is 32 and in use"),
        ("llama", {"sliding_window": 32}, "sliding_window is 32 and in use"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds sliding_attention"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen3", {"num_experts": 8}, "num_experts is 8"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type is 'yarn'"),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ("qwen3", {"head_dim": None}, "head_dim is missing"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "expected 'LlamaForCausalLM'"),
        ("llama", {"model_type": "gpt2"}, "model_type 'gpt2', supported: internlm2, llama, "),
        ("llama", {"hidden_size": "64"}, "expected an integer"),
        ("llama", {"num_hidden_layers": 0}, "model.language.num_layers = 0: expected at least 1"),
    ],
)
def test_what_the_llm_asks_for_and_we_lack_is_refused_by_name(
    tmp_path: Path, family: str, change: dict[str, Any], message: str
) -> None:
    folder = Folder(family, tmp_path / "llm")
    folder.config |= change
    with pytest.raises(UserError, match=message):
        folder.model()


def test_all_problems_at_once_and_harmless_values_pass(tmp_path: Path) -> None:
    folder = Folder("qwen2", tmp_path / "llm")
    folder.config |= {
        "use_sliding_window": False,
        "sliding_window": 131_072,
        "use_mrope": False,
        "torch_dtype": "float32",
    }
    folder.config["rope_parameters"] = None
    folder.config |= {"rope_theta": 12_345, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert folder.model().language.rope_theta == 12_345.0
    folder.config |= {"hidden_act": "relu", "num_key_value_heads": None}
    with pytest.raises(UserError, match=r"2 problem\(s\): num_key_value_heads is missing; hidden_act is 'relu'"):
        folder.model()


def test_both_spellings_of_llama3_frequencies(tmp_path: Path) -> None:
    folder = Folder("llama", tmp_path / "llm")
    folder.config["rope_parameters"] = LLAMA3_ROPE | {"rope_theta": 5e5}
    new = folder.model()
    folder.config |= {"rope_parameters": None, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000}
    assert folder.model() == new
    assert new.language.rope_scaling_factor == 8.0
    assert new.language.rope_original_length == 32


def test_run_config_that_disagrees_with_the_llm_is_refused_by_name(tmp_path: Path) -> None:
    folder = Folder("llama", tmp_path / "llm")
    layers = folder.config["num_hidden_layers"]
    with pytest.raises(UserError, match=rf"num_layers is 99, but the LLM has {layers}; .*qk_norm is True, but the LLM"):
        folder.model(num_layers=99, qk_norm=True)
    with pytest.raises(UserError, match="model.language.depth is not a setting"):
        folder.model(depth=3)
    assert folder.model(num_layers=layers) == folder.model()
    with pytest.raises(UserError, match=r"section \[vision\] is missing"):
        model_config_for_llm(folder.config, {}, IDS)
    with pytest.raises(UserError, match="but the tokenizer has"):
        model_config_for_llm(folder.config, {"vision": VISION, "special_token_ids": list(range(12))}, IDS)


def test_a_whole_model_section_that_agrees_is_taken(folder: Folder) -> None:
    assert model_config_for_llm(folder.config, config_to_dict(folder.model()), IDS) == folder.model()


def test_bare_llm_is_told_from_a_navil_folder(folder: Folder) -> None:
    assert is_bare_llm(folder.config)
    assert is_bare_llm({"model_type": "gpt2"})
    assert not is_bare_llm({"model_type": "navil_chat", "llm_config": {}, "vision_config": {}})
    assert not is_bare_llm({})


TEXTS = ("Hello world, how are you?", "a  b\tc\n", "naïve 日本 🙂", "<|end|>", "x<img>y")


def saved_tokenizer(folder: Path, **config: Any) -> Path:
    """A byte-level tokenizer with two control tokens, as an LLM's folder holds it."""
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(ALPHABET)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|start|>", special=True)])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def test_extended_tokenizer_loads_and_encodes_as_before(tmp_path: Path) -> None:
    source = saved_tokenizer(tmp_path / "llm", chat_template="{{ messages }}", extra_special_tokens=["<|start|>"])
    ids = extend_tokenizer(source, tmp_path / "new")
    assert tuple(ids) == SPECIAL_TOKENS
    first = len(ALPHABET) + 2
    assert (ids["<img>"], ids["</img>"], ids["<img_uncond>"]) == (first, first + 1, first + 11)
    loaded: SampleTokenizer = load_tokenizer(tmp_path / "new", tuple(ids.values()))
    assert loaded.vocab_size == first + 12
    assert loaded.pad_id == loaded.end_id == len(ALPHABET)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in TEXTS[:-1]:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after("x<img>y")["input_ids"][1] == ids["<img>"]
    assert after.chat_template == "{{ messages }}"
    assert {"<|start|>", *SPECIAL_TOKENS} <= set(after.all_special_tokens)


def test_tokens_that_exist_keep_their_ids_and_become_special(tmp_path: Path) -> None:
    source = saved_tokenizer(tmp_path / "llm", pad_token="<|start|>")
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "content": "<quad>", "special": False, "id": 258})
    (source / "tokenizer.json").write_text(json.dumps(content))
    ids = extend_tokenizer(source, tmp_path / "new")
    assert ids["<quad>"] == 258
    assert sorted(ids.values()) == list(range(258, 270))
    assert load_tokenizer(tmp_path / "new", tuple(ids.values())).pad_id == 257
    assert extend_tokenizer(tmp_path / "new", tmp_path / "again") == ids


def test_no_code_or_slow_files_of_the_folder_are_taken(tmp_path: Path) -> None:
    source = saved_tokenizer(
        tmp_path / "llm", tokenizer_class="InternLM2Tokenizer", auto_map={"AutoTokenizer": ["tok.Slow", "tok.Fast"]}
    )
    (source / "tok.py").write_text("raise SystemExit('ran code of the folder')")
    (source / "tokenizer.model").write_bytes(b"slow")
    ids = extend_tokenizer(source, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    load_tokenizer(tmp_path / "new", tuple(ids.values()))
    settings = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in settings


def test_folder_without_a_fast_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"slow")
    with pytest.raises(UserError, match=r"has no tokenizer.json: save its tokenizer as a fast one, or .* --tokenizer"):
        extend_tokenizer(tmp_path, tmp_path / "new")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="cannot be (loaded|read as JSON)"):
        extend_tokenizer(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
