"""Held-out loss and greedy text are the same at every layout, and the text is what transformers generates."""

import functools

import numpy as np
import pytest
import torch

from navil_megatron.blueprint.image_plan import ScalePlan
from navil_megatron.data.assemble import RowFormat
from navil_megatron.data.types import EncodedSample, SampleId
from navil_megatron.hf.hf_config import hf_config_from_model
from navil_megatron.hf.remote_code.configuration_navil_chat import NaViLChatConfig
from navil_megatron.hf.remote_code.modeling_navil_chat import NaViL
from navil_megatron.models.build import build_model
from navil_megatron.models.vision_encoder import normalise
from navil_megatron.training.evaluate import evaluate
from navil_megatron.training.generate import generate
from navil_megatron.training.optimizer import wrap_ddp
from tests.distributed.test_layouts import BATCH, LAYOUTS
from tests.oracle import SEQ_LENGTH, global_batch, merge_sections, oracle_config
from tests.ranks import run_ranks, start_session
from tests.tolerances import RANKS
from tests.whole import assemble, slices_of
from tests.whole_checkpoint import mcore_to_hf

NEW_TOKENS = 6
GRIDS = ((4, 4), (2, 4))
PLACES = ["tp2-sp", "pp2", "pp2-uneven", "pp2-interleaved", "tp2-sp-pp2", "dp2", "ep2", "cp2", "cp2-pp2"]


def prompt_of(config, number: int) -> tuple[EncodedSample, torch.Tensor]:
    """A synthetic prompt: one image and a little text, with its patches."""
    rows, columns = GRIDS[number]
    (microbatch,) = global_batch(config, (((5, (GRIDS[number],)),),))
    length = microbatch.sample_lengths[0]
    side = config.model.vision.patch_size
    scales = ((ScalePlan(rows * side, columns * side, rows, columns),),)
    prompt = EncodedSample(SampleId(0, number), microbatch.input_ids[:length], np.zeros(length, np.float32), scales)
    return prompt, microbatch.pixel_values


def outcome(rank: int, world_size: int, sections: dict) -> tuple[list[float], list[list[int]], list]:
    """Losses of the batch and of a number of rows that no pipeline divides, texts, and the weights of one rank."""
    config = oracle_config(**merge_sections({"data": {"seq_length": SEQ_LENGTH}}, sections))
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model)
        batch = global_batch(config, BATCH, session)
        share = len(batch) // session.groups.dp.size()
        mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
        losses = [evaluate(config, session, chunks, rows) for rows in (mine, batch[:3])]
        prompts, pixels = zip(*(prompt_of(config, number) for number in range(len(GRIDS))), strict=True)
        row_format = RowFormat(
            seq_length=SEQ_LENGTH, pad_segments_to=4, pad_id=0, special_token_ids=config.model.special_token_ids
        )
        texts = generate(
            config,
            session,
            chunks,
            prompts,
            torch.cat(pixels),
            row_format,
            end_id=-1,
            max_new_tokens=NEW_TOKENS,
        )
        return losses, texts, slices_of(model) if world_size == 1 else []


@functools.cache
def one_rank() -> tuple[list[float], list[list[int]], list]:
    return run_ranks(1, outcome, {})[0]


@pytest.mark.parametrize("layout", PLACES)
def test_every_layout_evaluates_and_generates_as_one_rank(layout: str) -> None:
    world_size, sections = LAYOUTS[layout]
    losses, texts, _ = one_rank()
    for found_losses, found_texts, _ in run_ranks(world_size, outcome, sections):
        torch.testing.assert_close(found_losses, losses, **RANKS)
        assert found_texts == texts


def test_text_is_what_the_exported_model_generates() -> None:
    config = oracle_config()
    _, texts, slices = one_rank()
    json_config = hf_config_from_model(config.model, dtype="float32", token_ids={}, image_settings={})
    model = NaViL(NaViLChatConfig(**json_config)).eval()
    model.load_state_dict(dict(mcore_to_hf(assemble(slices), config.model)))
    for number in range(len(GRIDS)):
        prompt, pixels = prompt_of(config, number)
        scale = prompt.scales[0][0]
        row = torch.from_numpy(prompt.input_ids)[None]
        grid = torch.tensor([[1, scale.grid_height, scale.grid_width]])
        inputs = {"pixel_values": normalise(pixels), "image_grid_thw": grid}
        found = model.generate(row, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, row.shape[1] :]
        special = set(config.model.special_token_ids)
        # Beyond a special token the reference embeds differently (see the docstring of training.generate).
        until = next((n + 1 for n, token in enumerate(texts[number]) if token in special), NEW_TOKENS)
        assert found[:until].tolist() == texts[number][:until]
