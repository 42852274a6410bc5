"""An exported folder as a chat model of lmms-eval.

``lmms-eval --model navil --model_args pretrained=exported/ --tasks textvqa_val``. Greedy, whatever sampling a task asks
for: a figure is to be the same twice.
"""

import os
from collections.abc import Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from navil_megatron.config.errors import UserError
from navil_megatron.evaluation.adapters.turns import answer_chats
from navil_megatron.evaluation.prompts import PromptStyle
from navil_megatron.hf.generate import load_for_generation

_MAX_NEW_TOKENS = 1024  # where a task sets no limit


class NaViL(lmms):
    """Answers the conversations of a task."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = "cuda",
        batch_size: int | str = 1,
        dtype: str = "bfloat16",
        prompts: PromptStyle = "auto",
        max_batch_size: int | str | None = None,
    ) -> None:
        """Loads ``pretrained``, what ``convert to-hf`` wrote; the code in it is run.

        ``prompts``: ``plain`` for a model of a phase that has not seen turns yet. lmms-eval hands in
        ``max_batch_size``; it is not used.
        """
        super().__init__()
        self._batch_size, self._prompts = int(batch_size), prompts
        place = device or "cuda"
        if place == "cuda" and "LOCAL_RANK" in os.environ:  # lmms-eval starts a process for each GPU
            place = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = torch.device(place)  # where lmms-eval puts what the processes exchange
        self._captioner = load_for_generation(Path(pretrained), getattr(torch, dtype), place)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One answer for each request, in order; those of the same settings share batches."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[2].items())), []).append(index)
        for indices in groups.values():
            for batch in batched(indices, self._batch_size):
                answers.update(zip(batch, self._answer([requests[index] for index in batch]), strict=True))
        return [answers[index] for index in range(len(requests))]

    def _answer(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to requests of (context, messages of a document, settings, document, task, split)."""
        settings = requests[0].args[2]
        chats = []
        for request in requests:
            _, messages_of, _, document, task, split = request.args
            chats.append(ChatMessages(messages=messages_of(self.task_dict[task][split][document])).to_hf_messages())
        limit = int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS)
        texts = answer_chats(self._captioner, chats, limit, self._prompts)
        until = settings.get("until") or []
        texts = [_cut(text, [until] if isinstance(until, str) else until) for text in texts]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], settings), text)
        return texts

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported: none of the paper's benchmarks ranks answers by their likelihood."""
        raise UserError("the adapter generates answers; choose the generating variant of this task")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[Any]:
        """Not supported: none of the paper's benchmarks asks in rounds."""
        raise UserError("the adapter answers in one round; leave this task out")


def _cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the marks that end an answer.

    A blank line is no such mark: lmms-eval adds it to tasks that name none, and a long answer has paragraphs.
    """
    for mark in until:
        text = text.split(mark)[0] if mark.strip() else text
    return text
