"""On text alone a NaViL that starts from an LLM is that LLM: transformers' own model gives the same logits."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from navil_megatron.blueprint.parameters import checkpoint_shapes
from navil_megatron.config.load import config_to_dict, section_from_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.types import ALONE, Microbatch, PackedRows, SampleId
from navil_megatron.hf.hf_config import hf_config_from_model
from navil_megatron.hf.jobs import export_jobs
from navil_megatron.hf.llm.start import llm_start_jobs, model_config_for_llm
from navil_megatron.hf.remote_code.configuration_navil_chat import NaViLChatConfig
from navil_megatron.hf.remote_code.modeling_navil_chat import NaViL
from navil_megatron.models.build import build_model
from navil_megatron.training.batch import build_model_inputs
from tests.ranks import run_ranks, start_session, tiny_config
from tests.tolerances import LLM_PEER
from tests.unit.hf_examples import FAMILIES
from tests.unit.llm_examples import VISION, run_in_memory, save_random_llm
from tests.whole import load_whole

SEEDS = range(5)
NUM_TOKENS = 45
CASES = [(family, seed) for family in FAMILIES for seed in SEEDS]


class Peer:
    """An LLM, transformers' logits for some text, and the NaViL that starts from it."""

    def __init__(self, family: str, seed: int, folder: Path) -> None:
        llm = save_random_llm(family, seed, folder)
        config = json.loads((folder / "config.json").read_text())
        num_tokens = config["vocab_size"]
        # Every other table has room for the special tokens, as Qwen's have.
        first = num_tokens - (12 if seed % 2 else 0)
        language = {"visual_expert_init": ("copy", "random")[seed % 2]}
        tables = {"vision": VISION, "language": language}
        self.model = model_config_for_llm(config, tables, tuple(range(first, first + 12)))
        assert self.model.language.family == family
        assert self.model.language.vocab_size == first + 12
        self.ids = torch.randint(0, num_tokens - 12, (NUM_TOKENS,), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.logits = llm(self.ids[None]).logits[0]
        stored = load_file(folder / "model.safetensors")
        jobs = llm_start_jobs(config, self.model, seed=3, dtype=torch.float32, stored=stored)
        self.whole = run_in_memory(jobs, stored)
        assert {key: tuple(tensor.shape) for key, tensor in self.whole.items()} == checkpoint_shapes(self.model)


@cache
def peer(family: str, seed: int) -> Peer:
    return Peer(family, seed, Path(mkdtemp()) / "llm")


def require_equal(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """The rows that the vocabulary grew by have no counterpart."""
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, **LLM_PEER)


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_exported_model_gives_the_llms_logits(family: str, seed: int) -> None:
    case = peer(family, seed)
    config = hf_config_from_model(case.model, dtype="float32", token_ids={}, image_settings={})
    ours = NaViL(NaViLChatConfig(**json.loads(json.dumps(config)))).eval()
    ours.load_state_dict(run_in_memory(export_jobs(case.model), case.whole))
    with torch.no_grad():
        require_equal(ours(case.ids[None]).logits[0], case.logits)
        # Left padding moves positions and masks, not what is computed.
        padded, mask = torch.cat((case.ids[:5], case.ids))[None], torch.ones(1, NUM_TOKENS + 5, dtype=torch.long)
        mask[0, :5] = 0
        require_equal(ours(padded, attention_mask=mask).logits[0, 5:], case.logits)


def test_engine_gives_the_llms_logits(tmp_path: Path) -> None:
    for family, seed in CASES:
        case = peer(family, seed)
        folder = tmp_path / f"{family}-{seed}"
        folder.mkdir()
        (folder / "model.json").write_text(json.dumps(config_to_dict(case.model)))
        save_file({"ids": case.ids, "logits": case.logits}, folder / "expected")
        save_file({key: tensor.contiguous() for key, tensor in case.whole.items()}, folder / "whole")
    run_ranks(1, engine_logits, sorted(tmp_path.iterdir()))


def engine_logits(rank: int, world_size: int, folders: list[Path]) -> None:
    assert len(folders) == len(CASES)
    for folder in folders:
        model = section_from_dict(ModelConfig, json.loads((folder / "model.json").read_text()), "model.json")
        config = tiny_config(model=model)
        expected = load_file(folder / "expected")
        with start_session(rank, world_size, config) as session:
            chunks = build_model(config, session.groups, session.device)
            load_whole(chunks, load_file(folder / "whole"))
            inputs = build_model_inputs(text_row(expected["ids"].numpy(), model))
            with torch.no_grad():
                logits = chunks[0](dataclasses.replace(inputs, labels=None))
        try:
            require_equal(logits, expected["logits"])
        except AssertionError as error:
            raise AssertionError(f"{folder.name}: {error}") from None


def text_row(ids: np.ndarray, model: ModelConfig) -> Microbatch:
    """One segment of text, predicted everywhere."""
    rows = PackedRows(
        input_ids=ids,
        position_ids=np.arange(ids.size),
        labels=np.zeros_like(ids),
        loss_weights=np.ones(ids.size, dtype=np.float32),
        visual_token_mask=np.zeros(ids.size, dtype=bool),
        segment_lengths=(ids.size,),
        image_grid_thw=np.zeros((0, 3), np.int64),
        samples=(SampleId(0, 0),),
        sample_starts=(0,),
        sample_lengths=(ids.size,),
    )
    return plan_microbatch(rows, model, ALONE, torch.empty(0, model.vision.patch_dim))
