"""An exported folder as a model of VLMEvalKit, which is run from its checkout.

``register("navil", "exported/")`` makes ``--model navil`` known before its ``run.py`` starts; docs/evaluation.md has
the lines.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vlmeval.vlm.base import BaseModel

from navil_megatron.evaluation.adapters.turns import answer_chats
from navil_megatron.evaluation.prompts import PromptStyle
from navil_megatron.hf.generate import load_for_generation


class NaViL(BaseModel):
    """Answers messages of pictures and text, with the toolkit's own prompts."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str,
        device: str = "cuda",
        dtype: str = "bfloat16",
        max_new_tokens: int = 1024,
        prompts: PromptStyle = "auto",
        **unused: Any,
    ) -> None:
        """Loads ``model_path``, what ``convert to-hf`` wrote; the code in it is run.

        ``prompts``: ``plain`` for a model of a phase that has not seen turns yet. ``unused`` are sampling settings that
        the toolkit hands to every model; decoding is greedy.
        """
        super().__init__()
        self._captioner = load_for_generation(Path(model_path), getattr(torch, dtype), device)
        self._max_new_tokens, self._prompts = max_new_tokens, prompts

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to parts of ``{"type": "image" or "text", "value"}``."""
        # Their part has its value under "value", whatever it is; ours under the name of its type.
        content = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        chat = [{"role": "user", "content": content}]
        return answer_chats(self._captioner, [chat], self._max_new_tokens, self._prompts)[0]


def register(name: str, folder: str, **settings: Any) -> None:
    """Adds a folder to the models that VLMEvalKit knows by name."""
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(NaViL, model_path=folder, **settings)
