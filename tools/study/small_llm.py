"""Pretrains the small LLMs of the study on captions alone, with transformers' own Qwen3.

The text speaks of scenes that no image shows: an LLM learns the language of captions, not what anything looks like.
"""

import logging
import math
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from examples.quickstart.scenes import SceneSampler
from tools.study.arms import HEAD_DIM, Llm

BATCH, LENGTH = 16, 128
WARMUP_SHARE = 0.1
LR = 2e-3
NUM_CAPTIONS = 40_000
HELD_OUT = 16
"""Rows of ``LENGTH`` tokens kept for the loss that is reported."""

logger = logging.getLogger(__name__)


def captions(emoji: list[str], difficulty: int, seed: int) -> list[str]:
    """Captions of scenes with any pair of emoji, those of the held-out scenes too: text knows that they can meet."""
    sampler, random = SceneSampler(emoji, difficulty, heldout_share=0.0, seed=seed), Random(seed)
    pairs = [frozenset(random.sample(emoji, 2)) for _ in range(NUM_CAPTIONS)]
    return [sampler.draw(pair).caption for pair in pairs]


def pretrain(llm: Llm, texts: list[str], tokenizer_folder: Path, folder: Path, steps: int) -> float:
    """Writes a Hugging Face folder. -> cross entropy of a token of held-out text, in nats.

    Args:
        llm: Its sizes.
        texts: What it reads, each followed by the end token.
        tokenizer_folder: The scenes' tokenizer.
        folder: Where to; must not exist.
        steps: Updates of ``BATCH`` rows of ``LENGTH`` tokens.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_token_id)]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH], device=device).view(-1, LENGTH)
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(_config(llm, len(tokenizer))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        warm = min(1.0, step / (WARMUP_SHARE * steps))
        optimizer.param_groups[0]["lr"] = LR * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        final = float(model(input_ids=held_out, labels=held_out).loss)
    tokenizer.save_pretrained(folder)
    model.cpu().save_pretrained(folder)
    logger.info("%s: %.3f nats a token after %d steps", folder, final, steps)
    return final


def _config(llm: Llm, vocab_size: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=llm.width,
        intermediate_size=3 * llm.width,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads,
        num_key_value_heads=llm.groups,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
    )
