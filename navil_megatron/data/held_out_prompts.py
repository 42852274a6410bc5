"""A few held-out samples with pictures, up to what the model is to say: looked at during a run, before any score."""

import io
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps

from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.assemble import RowFormat
from navil_megatron.data.loader import load_run_tokenizer, open_sources
from navil_megatron.data.measure import REFUSED, Ruler
from navil_megatron.data.microbatches import MicrobatchBuilder
from navil_megatron.data.plan import Row
from navil_megatron.data.types import DataPlace, EncodedSample

MAX_PROMPTS, MAX_NEW_TOKENS = 6, 48
_LOOKED_AT = 200  # samples from which the prompts are taken
_PAGE_SIDE = 320  # of a picture that is kept for the page, in pixels


@dataclass(frozen=True, slots=True)
class HeldOutPrompts:
    """Prompts that fit one row together, with room for an answer each."""

    samples: tuple[EncodedSample, ...]
    """Up to the first token that carries loss."""
    pixel_values: torch.Tensor
    """[p, 3 * patch * patch] patches of all their images."""
    row_format: RowFormat
    end_id: int
    """Token that ends an answer."""
    names: tuple[str, ...]
    wanted: tuple[str, ...]
    """What the samples say."""
    pictures: tuple[Image.Image, ...]
    """The first image of each, small."""


def load_held_out_prompts(config: NaViLConfig, place: DataPlace) -> HeldOutPrompts:
    """The first samples of ``evaluation.sources`` that will do; the same on every rank.

    Raises:
        UserError: None will do.
    """
    tokenizer = load_run_tokenizer(config)
    index = config.evaluation.sources[0]
    (source,) = sources = open_sources([index], tokenizer, config.data.remote)
    # Every rank makes the whole row: it keeps what is its own when it plans the microbatch.
    builder = MicrobatchBuilder(config, sources, tokenizer, place=replace(place, is_first_stage=True))
    numbers = np.arange(min(len(source), _LOOKED_AT))
    dropped = Ruler(config).measure(source.index, numbers).dropped
    left = config.data.seq_length - config.pad_segments_to
    start_id = config.model.special_token_id("<img>")
    chosen: list[tuple[EncodedSample, str]] = []
    end_id = None
    for number in numbers[(dropped != REFUSED) & (source.index.samples[numbers]["num_images"] > 0)]:
        row = Row(np.zeros(1, np.int64), numbers[number : number + 1], dropped[number : number + 1], 0)
        ((sample,),) = (packed.samples for packed in builder.encode([row]))
        learned = np.flatnonzero(sample.loss_weights)
        if sample.damage or not len(learned) or start_id in sample.input_ids[learned[0] :]:
            continue
        first = int(learned[0])
        answer = sample.input_ids[first:][: int(np.argmin(np.append(sample.loss_weights[first:] > 0, False)))]
        end_id = int(answer[-1]) if end_id is None else end_id
        needed = first + MAX_NEW_TOKENS
        if needed > left or end_id != answer[-1] or len(chosen) == MAX_PROMPTS:
            continue
        left -= needed
        prompt = replace(sample, input_ids=sample.input_ids[:first], loss_weights=sample.loss_weights[:first])
        chosen.append((prompt, tokenizer.hugging_face.decode(answer[:-1].tolist())))
    if end_id is None or not chosen:
        raise UserError(
            f"training.generate_every_steps is set, but no picture of {index} fits a row of {config.data.seq_length} "
            f'tokens with {MAX_NEW_TOKENS} new ones; set it to "none", or lengthen the rows'
        )
    samples = tuple(sample for sample, _ in chosen)
    return HeldOutPrompts(
        samples=samples,
        pixel_values=builder.decode_all(samples),
        row_format=builder.row_format,
        end_id=end_id,
        names=tuple(source.key(sample.sample.number) for sample in samples),
        wanted=tuple(wanted for _, wanted in chosen),
        pictures=tuple(_small(source.read_image(sample.sample.number, 0)) for sample in samples),
    )


def _small(file: bytes) -> Image.Image:
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    except Exception:  # a damaged file makes Pillow raise a dozen types; the model is shown a blank one, too
        return Image.new("RGB", (_PAGE_SIDE, _PAGE_SIDE))
    picture.thumbnail((_PAGE_SIDE, _PAGE_SIDE))
    return picture
