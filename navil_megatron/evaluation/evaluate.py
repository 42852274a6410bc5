"""An evaluation from end to end: read the set, answer what is not answered yet, score, and write the page.

Greedy decoding in the order of the file. A picture that cannot be read leaves its sample out; the report names it.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import batched
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from navil_megatron.config.errors import UserError
from navil_megatron.evaluation.predictions import Predictions, digest_of_model
from navil_megatron.evaluation.prompts import PromptStyle, prompt_of
from navil_megatron.evaluation.samples import Sample, read_samples
from navil_megatron.evaluation.scores import Scored, score
from navil_megatron.evaluation.worst_page import write_worst_page
from navil_megatron.files.hashes import digest, digest_of_files
from navil_megatron.files.json_file import write_json
from navil_megatron.hf.generate import Captioner, generate_texts, load_for_generation, open_picture

type Damaged = dict[str, str]
"""Sample id -> why its pictures cannot be used."""


@dataclass(frozen=True)
class Settings:
    """How the model is asked."""

    max_new_tokens: int = 64
    prompts: PromptStyle = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None  # ``None``: as stored
    batch_size: int = 8
    device: str = "cpu"
    num_worst: int = 24  # samples of each task on the page


def evaluate(
    folder: Path, data: Path, output: Path, settings: Settings, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Evaluates an exported folder on a set and gives the report, which is also left as ``report.json`` in ``output``.

    The code in ``folder`` is run. A run that was stopped goes on from what is in ``output``.

    Raises:
        UserError: Folder, set or earlier predictions cannot be used, or no sample can be answered.
    """
    samples = read_samples(data)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give what `convert to-hf` made with a tokenizer")
    decisive = (settings.max_new_tokens, settings.prompts, settings.dtype)  # batches of any size give the same answers
    asked = digest(json.dumps(decisive).encode())
    marks = {"model": digest_of_model(folder), "data": digest_of_files([data]), "settings": asked}
    predictions = Predictions(output / "predictions.jsonl", marks)
    texts, damaged = _answer(samples, predictions, folder, settings, on_progress)
    answered = [sample for sample in samples if sample.id in texts]
    if not answered:
        first, reason = next(iter(damaged.items()))
        raise UserError(f"none of the {len(samples)} samples of {data} can be answered; {first!r}: {reason}")
    scored, scores = score([Scored(sample, texts[sample.id]) for sample in answered])
    write_worst_page(output / "worst.html", scored, scores, settings.num_worst, title=f"{folder.name} on {data.name}")
    report = {
        "folder": str(folder),
        "data": str(data),
        "num_samples": len(samples),
        "num_answered": len(answered),
        "damaged": [{"id": name, "reason": reason} for name, reason in damaged.items()],
        "scores": scores,
        "settings": dataclasses.asdict(settings),
        "predictions": str(predictions.path),
        "page": str(output / "worst.html"),
        "digests": marks,
    }
    write_json(output / "report.json", report, indent=1)
    return report


def _answer(
    samples: Sequence[Sample],
    predictions: Predictions,
    folder: Path,
    settings: Settings,
    on_progress: Callable[[int, int], None],
) -> tuple[dict[str, str], Damaged]:
    """The answers, those of earlier runs included, and the samples that have none."""
    texts: dict[str, str] = {}
    damaged: Damaged = {}
    pictures_of: dict[str, str] = {}
    digest_once = cache(digest_of_files)  # questions often share their pictures
    for sample in samples:
        try:
            pictures_of[sample.id] = digest_once(sample.images)
        except OSError as error:
            damaged[sample.id] = f"{error.filename} cannot be read ({error.strerror})"
            continue
        earlier = predictions.get(sample.id, pictures_of[sample.id])
        if earlier is not None:
            texts[sample.id] = earlier
    waiting = [sample for sample in samples if sample.id not in texts and sample.id not in damaged]
    on_progress(len(texts) + len(damaged), len(samples))
    if not waiting:
        return texts, damaged
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    captioner = load_for_generation(folder, dtype, settings.device)
    for batch in batched(waiting, settings.batch_size):
        found = _answer_batch(captioner, batch, settings, damaged)
        predictions.add((sample.id, pictures_of[sample.id], found[sample.id]) for sample in batch if sample.id in found)
        texts |= found
        on_progress(len(texts) + len(damaged), len(samples))
    return texts, damaged


def _answer_batch(
    captioner: Captioner, batch: Sequence[Sample], settings: Settings, damaged: Damaged
) -> dict[str, str]:
    """Answers to the samples whose pictures can be used; the others join ``damaged``."""
    pictures: dict[str, list[Image.Image]] = {}
    for sample in batch:
        try:
            opened = [open_picture(path) for path in sample.images]
            captioner.processor.image_processor.plan([(picture.height, picture.width) for picture in opened])
        except (UserError, ValueError) as error:  # plan() refuses pictures that are far too long
            damaged[sample.id] = " ".join(str(error).split())
        else:
            pictures[sample.id] = opened
    sound = [sample for sample in batch if sample.id in pictures]
    if not sound:
        return {}
    prompts = [prompt_of(sample, captioner.processor, settings.prompts) for sample in sound]
    texts = generate_texts(captioner, [pictures[sample.id] for sample in sound], prompts, settings.max_new_tokens)
    return {sample.id: text.strip() for sample, text in zip(sound, texts, strict=True)}
