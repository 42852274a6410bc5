"""Captions the held-out scenes with the exported folder, through transformers alone, and again with swapped images.

Runs as a process of its own: ``caption.py HF_FOLDER DATA_FOLDER OUTPUT_FOLDER``. Writes ``captions.json``.
"""

import io
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from navil_megatron.data.shards.source import Source
from navil_megatron.data.types import SampleId
from navil_megatron.data.validation import swapped_pictures

BATCH_SIZE = 40
MAX_NEW_TOKENS = 48


def main() -> int:
    """Writes what was generated and how much of it is exactly right."""
    hf_folder, data_folder, output = (Path(word) for word in sys.argv[1:4])
    disable_progress_bar()  # of loading: this script has one of its own
    model = AutoModelForImageTextToText.from_pretrained(hf_folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(hf_folder, trust_remote_code=True)
    source = Source(data_folder / "heldout.index")
    samples = [source.read(number) for number in range(len(source))]
    images = [Image.open(io.BytesIO(sample.images[0])).convert("RGB") for sample in samples]
    truth = [sample.content for sample in samples]
    swap = swapped_pictures(source)
    swapped = [swap(SampleId(0, number)).number for number in range(len(source))]
    started = time.perf_counter()
    columns = (TextColumn("captions"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("captions", total=2 * len(images))
        generated = caption(model, processor, images, lambda done: progress.advance(task, done))
        of_swapped = caption(model, processor, [images[i] for i in swapped], lambda done: progress.advance(task, done))
    matches = [a == b for a, b in zip(generated, truth, strict=True)]
    swapped_matches = [a == b for a, b in zip(of_swapped, truth, strict=True)]
    report = {
        "exact_match": sum(matches) / len(matches),
        "exact_match_swapped": sum(swapped_matches) / len(matches),
        "num_samples": len(matches),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - started,
        "samples": [
            {"index": number, "caption": truth[number], "generated": generated[number]} for number in range(len(truth))
        ],
    }
    (output / "captions.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


@torch.inference_mode()
def caption(model, processor, images: list[Image.Image], on_progress) -> list[str]:
    """Greedy captions, batch by batch."""
    texts: list[str] = []
    for start in range(0, len(images), BATCH_SIZE):
        batch = [[image] for image in images[start : start + BATCH_SIZE]]
        inputs = processor(images=batch, text=["<image>"] * len(batch))
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts += processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        on_progress(len(batch))
    return texts


if __name__ == "__main__":
    sys.exit(main())
