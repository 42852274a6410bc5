"""``navil-megatron init``: the config of a run's first phase, of an LLM, an index and a number of GPUs.

The LLM becomes the checkpoint that the run starts from, with the encoder that the paper's 1% rule gives it. Batch and
warm-up follow from the data, as far as the paper's are too large for it, and the layout is the fastest that ``plan``
finds. What is written has been loaded and validated.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from navil_megatron.blueprint.parameters import count_by_part
from navil_megatron.blueprint.workload import typical_workload
from navil_megatron.config.data import DataConfig
from navil_megatron.config.errors import UserError
from navil_megatron.config.load import EXTENDS, config_to_dict, load_config, section_from_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.paths import under
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import validate
from navil_megatron.data.loader import open_sources
from navil_megatron.data.measure import REFUSED, Ruler
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import load_tokenizer
from navil_megatron.files.atomic_file import new_file
from navil_megatron.files.atomic_folder import require_new
from navil_megatron.files.checkpoint_folder import is_checkpoint, read_config
from navil_megatron.files.json_file import read_json
from navil_megatron.files.worker_pool import OnProgress
from navil_megatron.hf.exported.tokenizer_files import extend_tokenizer
from navil_megatron.hf.llm.ingest import MODEL_FILE, TOKENIZER_FOLDER, convert_llm
from navil_megatron.hf.llm.start import model_config_for_llm
from navil_megatron.hf.model_source import kind_of
from navil_megatron.planner.hardware import Hardware
from navil_megatron.planner.report import describe_layout
from navil_megatron.planner.search import Candidate, search_layouts
from navil_megatron.scaling.load import load_study
from navil_megatron.scaling.recommend import find_optima, recommend
from navil_megatron.scaling.shape import choose_shape
from navil_megatron.scaling.sizes import format_size

PAPER_BATCH_TOKENS = 7_000 * 1_079
"""Of one update in the paper's stage 1.1: 7,000 samples at 1,079 tokens each (examples/README.md)."""
PAPER_ROW_TOKENS, PAPER_PIXELS, PAPER_WARMUP = 16_384, 1_048_576, 200
MIN_STEPS = 100
"""The fewest steps that are proposed, however few the samples are."""
WISHED_STEPS = 1_000
"""Batches smaller than the paper's leave so many steps to a pass over the data."""
USUAL_SMALLEST_PIXELS: Any = DataConfig.__dataclass_fields__["min_image_pixels"].default
ROW_SHARE_OF_IMAGE = 0.5
"""Largest share of a row that the largest image takes with its smaller scales, about as many tokens as its own."""
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
"""Of the encoder."""
_NUM_MEASURED = 10_000
"""Samples of a source, evenly spread, by which the others are judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What ``init`` is told."""

    llm: Path
    data: Sequence[Path]
    gpus: int
    output: Path
    weights: Path
    encoder: float | None  # parameters; ``None``: by the paper's rule
    tokenizer: Path | None  # ``None``: that in the LLM's folder
    steps: int | None  # ``None``: by the data
    device: str
    hbm: float


@dataclass(frozen=True, slots=True)
class _Samples:
    """What the indexes hold, measured under one config."""

    number: int
    tokens: float  # of a sample, on average
    text_tokens: int  # of them, text of its own
    image_side: int  # of a square image of the average area, in pixels


def init_run(wanted: Wanted, on_progress: OnProgress) -> dict[str, Any]:
    """Makes the checkpoint where it is not there yet, writes the config, and gives what was chosen, ready for JSON.

    Raises:
        UserError: LLM, data, encoder and GPUs do not go together, or the config is there already.
    """
    require_new(wanted.output)
    kind = kind_of(wanted.llm)
    if kind != "LLM folder":
        raise UserError(f"--llm {wanted.llm} is a {kind}, expected the Hugging Face folder of a language model")
    is_made = is_checkpoint(wanted.weights)
    with TemporaryDirectory() as scratch:
        tokenizer = wanted.weights / TOKENIZER_FOLDER if is_made else Path(scratch) / TOKENIZER_FOLDER
        model, chosen, warnings = _stored_model(wanted) if is_made else _new_model(wanted, tokenizer)
        loaded = load_tokenizer(tokenizer, model.special_token_ids)
        tables = _tables(wanted, model)
        config = _read(wanted, tables)
        sources = open_sources([source.index for source in config.data.train_sources], loaded, config.data.remote)
    samples = _measure(config, sources)
    _set_length(wanted, tables, samples)
    best = _fastest(_read(wanted, tables), wanted, samples)
    tables["parallel"] = _changed(best.config.parallel, ParallelConfig())
    tables["training"] |= {
        name: value
        for name, value in _changed(best.config.training, config.training).items()
        if name.startswith("recompute")
    }
    encoder = {name: getattr(model.vision, name) for name in _SIZES}
    if not is_made:
        sizes = [f"model.vision.{name}={value}" for name, value in encoder.items()]
        convert_llm(wanted.llm, wanted.weights, None, sizes, tokenizer=wanted.tokenizer, on_progress=on_progress)
    _write(wanted.output, tables, f"the LLM's sizes; encoder {chosen}")
    validate(load_config(wanted.output), wanted.gpus)
    return {
        "config": str(wanted.output),
        "weights": str(wanted.weights),
        "weights_made": not is_made,
        "encoder": {"parameters": count_by_part(model)["vision_encoder"], "chosen": chosen, **encoder},
        "num_samples": samples.number,
        "tokens_per_sample": round(samples.tokens, 1),
        **{name: tables["training"][name] for name in ("train_steps", "global_batch_size")},
        "warmup_steps": tables["optimizer"]["warmup_steps"],
        "layout": describe_layout(best.config),
        "reason": best.reason,
        "warnings": warnings,
    }


def describe_init(report: Mapping[str, Any], gpus: int) -> str:
    """The report for a terminal."""
    encoder = report["encoder"]
    made = "made of the LLM" if report["weights_made"] else "there already"
    return "\n".join(
        [
            f"{report['config']}; weights: {report['weights']}, {made}",
            f"encoder: {encoder['parameters']:,} parameters, {encoder['num_layers']} layers of "
            f"{encoder['hidden_size']}, {encoder['chosen']}",
            f"data: {report['num_samples']:,} samples of {report['tokens_per_sample']:g} tokens on average",
            f"{report['train_steps']:,} steps of {report['global_batch_size']} rows; warm-up {report['warmup_steps']}",
            f"layout on {gpus}: {report['layout']} ({report['reason']})",
            *(f"warning: {warning}" for warning in report["warnings"]),
            f"next: navil-megatron train {report['config']} --nproc {gpus}",
        ]
    )


def _stored_model(wanted: Wanted) -> tuple[ModelConfig, str, list[str]]:
    """The model of a checkpoint that is there already, which must be one of the LLM."""
    if wanted.encoder is not None:
        raise UserError(f"{wanted.weights} has an encoder already: leave --encoder out, or give another --weights")
    stored = read_config(wanted.weights)["model"]
    model = model_config_for_llm(read_json(wanted.llm / "config.json"), stored, tuple(stored["special_token_ids"]))
    return model, f"as in {wanted.weights}", []


def _new_model(wanted: Wanted, tokenizer: Path) -> tuple[ModelConfig, str, list[str]]:
    """The LLM with an encoder, how that was chosen, and what to warn of; the extended tokenizer is written."""
    require_new(wanted.weights)
    llm, ids = read_json(wanted.llm / "config.json"), extend_tokenizer(wanted.tokenizer or wanted.llm, tokenizer)

    def with_encoder(depth: int, width: int, heads: int) -> ModelConfig:
        sizes = dict(zip(_SIZES, (depth, width, 4 * width, heads), strict=True))
        return model_config_for_llm(llm, {"vision": sizes}, ids)

    if wanted.encoder is not None:
        shape, warnings = choose_shape(wanted.encoder)
        return with_encoder(shape.depth, shape.width, shape.heads), "as asked for", warnings
    parts = count_by_part(with_encoder(1, 64, 1))
    of_llm = sum(count for part, count in parts.items() if part.startswith("text") or part in ("embedding", "head"))
    advice = recommend(find_optima(load_study(None), llm=of_llm), of_llm)
    low, high = (format_size(end) if end else "unknown" for end in advice.interval)
    chosen = f"by the paper's 1% rule for {format_size(of_llm)}: {format_size(advice.encoder)} ({low} to {high})"
    return with_encoder(advice.shape.depth, advice.shape.width, advice.shape.heads), chosen, list(advice.warnings)


def _tables(wanted: Wanted, model: ModelConfig) -> dict[str, Any]:
    """The config but for length, batch and layout, as its file will have it."""
    folder, name = wanted.output.parent, wanted.output.stem
    weights = _seen_from(folder, wanted.weights)
    language, vision = model.language, model.vision
    row = min(PAPER_ROW_TOKENS, language.max_position_embeddings)
    # A picture and its smaller scales, half the area each, are as many tokens as twice the picture.
    largest = int(row * ROW_SHARE_OF_IMAGE / 2) * (vision.patch_size * vision.merge_size) ** 2
    pixels = min(PAPER_PIXELS, largest)
    return {
        "model": config_to_dict(model),
        "data": {
            "train_sources": [{"index": _seen_from(folder, index)} for index in wanted.data],
            "tokenizer": f"{weights}/{TOKENIZER_FOLDER}",
            "seq_length": row,
            "min_image_pixels": min(USUAL_SMALLEST_PIXELS, pixels),
            "max_image_pixels": pixels,
        },
        "training": {"phase": "s1.1", "train_steps": MIN_STEPS, "global_batch_size": wanted.gpus},
        "optimizer": {"lr": 5e-5, "lr_schedule": "constant", "warmup_steps": 0, "weight_decay": 0.05},
        "checkpoint": {"directory": f"{name}/checkpoints", "initial_weights": weights},
        "runtime": {"device": wanted.device},
        "logging": {"directory": f"{name}/logs"},
    }


def _seen_from(folder: Path, path: Path) -> str:
    """A path as a config in the folder names it: relative if it lies below, so that both can be moved."""
    path, folder = path.absolute(), folder.absolute()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _read(wanted: Wanted, tables: Mapping[str, Any]) -> NaViLConfig:
    return section_from_dict(NaViLConfig, under(wanted.output.parent, NaViLConfig, tables), "the proposed config")


def _measure(config: NaViLConfig, sources: Sequence[Source]) -> _Samples:
    ruler, tokens, texts, areas = Ruler(config), [], [], []
    for source in sources:
        chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), _NUM_MEASURED)).astype(np.int64))
        found = ruler.measure(source.index, chosen)
        fitting = found.dropped != REFUSED
        tokens.append((found.num_text + found.num_visual)[fitting])
        records = source.index.samples[chosen]
        texts.append(records["text_tokens"])
        if len(source.index.images):
            images = source.index.images[np.unique(records["first_image"][records["num_images"] > 0])]
            areas.append(images["height"].astype(np.int64) * images["width"])
    every = np.concatenate(tokens)
    if not len(every):
        raise UserError(f"no sample of the data fits a row of {config.data.seq_length} tokens, or it holds none")
    return _Samples(
        number=sum(map(len, sources)),
        tokens=float(every.mean()),
        text_tokens=max(1, round(float(np.concatenate(texts).mean()))),
        image_side=round(math.sqrt(np.concatenate(areas).mean())) if areas else 1,
    )


def _set_length(wanted: Wanted, tables: dict[str, Any], samples: _Samples) -> None:
    """Steps, batch and warm-up: the paper's batch where the data are enough for it, and one pass over them."""
    training, row = tables["training"], tables["data"]["seq_length"]
    rows = samples.number * samples.tokens / row
    wished = min(PAPER_BATCH_TOKENS / row, rows / (wanted.steps or WISHED_STEPS))
    # Whole rows for each GPU, whatever the layout.
    batch = wanted.gpus * max(1, round(wished / wanted.gpus))
    steps = wanted.steps or max(MIN_STEPS, math.ceil(rows / batch))
    training |= {"train_steps": steps, "global_batch_size": batch, "log_every_steps": 1 if steps <= 1_000 else 10}
    tables["optimizer"]["warmup_steps"] = min(PAPER_WARMUP, steps // 10)
    tables["checkpoint"]["save_every_steps"] = max(1, min(1_000, steps // 10))


def _fastest(config: NaViLConfig, wanted: Wanted, samples: _Samples) -> Candidate:
    """The fastest layout that fits.

    Raises:
        UserError: None does.
    """
    hardware = Hardware(gpus=wanted.gpus, hbm=wanted.hbm)
    found = search_layouts(config, hardware, typical_workload(config, samples.text_tokens, samples.image_side))
    if not found[0].fits:
        nearest = f"the nearest, {describe_layout(found[0].config)}: {found[0].reason}"
        raise UserError(f"no layout fits {wanted.gpus} GPUs of {wanted.hbm:g} GB; {nearest}; give more --gpus")
    return found[0]


def _changed(section: Any, usual: Any) -> dict[str, Any]:
    """The settings of a section that are not as usual."""
    here, there = config_to_dict(section), config_to_dict(usual)
    return {name: value for name, value in here.items() if value != there[name]}


def _write(output: Path, tables: Mapping[str, Any], of_model: str) -> None:
    """Writes the config; its model is that of the weights, which have it beside them."""
    model = f"{tables['checkpoint']['initial_weights']}/{MODEL_FILE}"
    lines = [
        "# Stage 1.1 of the paper's recipe, written by navil-megatron init: yours to change.",
        f"{EXTENDS} = {json.dumps(model)}  # [model]: {of_model}",
    ]
    for name, table in tables.items():
        if name != "model" and table:
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_file(output) as file:
        file.write(("\n".join(lines) + "\n").encode())


def _toml(value: Any) -> str:
    """A value on one line; JSON's strings, numbers and booleans are TOML's too."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(item)}' for key, item in value.items())} }}"
    return json.dumps(value)
