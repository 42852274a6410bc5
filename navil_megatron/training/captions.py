"""Captions of a few held-out pictures, every ``training.generate_every_steps``: what people look at first."""

import logging
from pathlib import Path

from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.held_out_prompts import MAX_NEW_TOKENS, load_held_out_prompts
from navil_megatron.data.loader import load_run_tokenizer
from navil_megatron.data.show.captions_page import captions_text, render_captions
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import place_of
from navil_megatron.training.generate import generate
from navil_megatron.training.step import Chunks

logger = logging.getLogger(__name__)

FOLDER = "captions"
"""In ``logging.directory``: ``step_00000100.txt`` and ``.html``."""


class HeldOutCaptions:
    """Lets the model caption the same pictures again and again. Every rank makes one and calls it at the same point."""

    def __init__(self, config: NaViLConfig, session: Session):
        """Loads the pictures; UserError where none will do."""
        self._config, self._session = config, session
        self._tokenizer = load_run_tokenizer(config).hugging_face
        self._prompts = load_held_out_prompts(config, place_of(session))

    def write(self, step: int, chunks: Chunks) -> None:
        """Generates, greedily; rank 0 writes a text and a page."""
        prompts = self._prompts
        found = generate(
            self._config,
            self._session,
            chunks,
            prompts.samples,
            prompts.pixel_values,
            prompts.row_format,
            end_id=prompts.end_id,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        if not self._session.is_main:
            return
        said = [self._tokenizer.decode(tokens) for tokens in found]
        folder = Path(self._config.logging.directory) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{step:08d}.html"
        path.with_suffix(".txt").write_text(captions_text(prompts.names, prompts.wanted, said), encoding="utf-8")
        page = render_captions(
            f"Held-out pictures at step {step}", prompts.names, prompts.wanted, said, prompts.pictures
        )
        path.write_text(page, encoding="utf-8")
        logger.info("captions of %d held-out pictures at step %d: %s", len(said), step, path)
