"""Greedy text from the training engine itself, at any layout: what a checkpoint says before it is exported.

Every step runs the whole row again (there is no cache), so this is for looking at a few samples during a run; serving
is the exported folder's business. New tokens are embedded as in training, special tokens from their own table.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.assemble import RowFormat, assemble
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.types import IGNORED_LABEL, EncodedSample, PackedSequence
from navil_megatron.models.inputs import ModelInputs
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import place_of
from navil_megatron.training.step import Chunks, schedule_over


@torch.no_grad()
def generate(
    config: NaViLConfig,
    session: Session,
    chunks: Chunks,
    prompts: Sequence[EncodedSample],
    pixel_values: Tensor,
    row_format: RowFormat,
    *,
    end_id: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Continue each prompt greedily. Every rank calls it with the same prompts and gets the same tokens.

    Args:
        config: The run.
        session: This rank.
        chunks: Its model chunks.
        prompts: Samples to continue.
        pixel_values: [p, patch_dim] patches of all their images, in order of appearance.
        row_format: How rows are laid out.
        end_id: Token that ends a text; it is not part of the result.
        max_new_tokens: Longest text.

    Raises:
        UserError: The prompts and their new tokens do not fit a row.
    """
    needed = sum(len(prompt.input_ids) + max_new_tokens for prompt in prompts) + row_format.pad_segments_to
    if needed > config.data.seq_length:
        raise UserError(
            f"{len(prompts)} prompts with {max_new_tokens} new tokens each need {needed} tokens, a row holds "
            f"{config.data.seq_length}: give fewer prompts or raise data.seq_length"
        )
    for chunk in chunks:
        chunk.eval()
    texts: list[list[int]] = [[] for _ in prompts]
    open_texts = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        samples = [_extended(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        for number, token in enumerate(_next_tokens(config, session, chunks, samples, pixel_values, row_format)):
            if number in open_texts and token == end_id:
                open_texts.discard(number)
            elif number in open_texts:
                texts[number].append(token)
        if not open_texts:
            break
    for chunk in chunks:
        chunk.train()
    return texts


def _extended(prompt: EncodedSample, text: Sequence[int]) -> EncodedSample:
    return dataclasses.replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, np.asarray(text, dtype=np.int64)]),
        loss_weights=np.zeros(len(prompt.input_ids) + len(text), dtype=np.float32),
    )


def _next_tokens(
    config: NaViLConfig,
    session: Session,
    chunks: Chunks,
    samples: Sequence[EncodedSample],
    pixel_values: Tensor,
    row_format: RowFormat,
) -> list[int]:
    """The likeliest token after each sample, the same on every rank."""
    empty = [PackedSequence((), config.data.seq_length)] * (config.training.micro_batch_size - 1)
    rows = assemble([PackedSequence(tuple(samples), config.data.seq_length), *empty], row_format)
    # The last token of each sample is where its next one is predicted; the label tells whose it is, since a
    # context-parallel rank predicts some of them.
    last = np.cumsum([len(sample.input_ids) for sample in samples]) - 1
    labels = np.full_like(rows.labels, IGNORED_LABEL)
    labels[last] = np.arange(len(samples))
    microbatch = plan_microbatch(
        dataclasses.replace(rows, labels=labels), config.model, place_of(session), pixel_values
    )
    # The interleaved schedule takes microbatches in whole groups of one per stage.
    copies = session.groups.pp.size() if len(chunks) > 1 else 1
    outputs = schedule_over(
        config, session, chunks, [microbatch] * copies, forward_logits, forward_only=True, collect_non_loss_data=True
    )
    tokens = torch.zeros(len(samples), dtype=torch.long, device=session.device)
    if session.is_last_stage:
        logits, numbers = outputs[0]
        tokens[numbers] = logits.argmax(dim=-1)
        torch.distributed.all_reduce(tokens, group=session.groups.cp)
    last_stage = torch.distributed.get_global_rank(session.groups.pp, session.groups.pp.size() - 1)
    torch.distributed.broadcast(tokens, src=last_stage, group=session.groups.pp)
    return tokens.tolist()


def forward_logits(inputs: Iterator[ModelInputs], chunk: nn.Module) -> tuple[Tensor, object]:
    """What the schedule calls: logits instead of a loss, and the labels of their positions."""
    microbatch = next(inputs)
    logits = chunk(dataclasses.replace(microbatch, labels=None))
    return logits, lambda logits, non_loss_data: (logits, microbatch.labels)
