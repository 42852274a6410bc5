"""Runs the same prompts through two sets of weights and says how far apart they are, layer by layer.

A checkpoint runs in the megatron-core model, as in training; a Hugging Face folder runs in the plain torch model that
every export carries (ours, never the code inside the folder). Both in float32 in one CPU process, one after the other,
so only one model is in memory. "Equal weights, different outputs" has nowhere to hide between the two.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from navil_megatron.blueprint.image_plan import visual_tokens
from navil_megatron.checkpoint.sharded import load_model, read_contents
from navil_megatron.config.checkpoint import CheckpointConfig
from navil_megatron.config.data import DataConfig
from navil_megatron.config.errors import UserError
from navil_megatron.config.logging import LoggingConfig
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.optimizer import OptimizerConfig
from navil_megatron.config.precision import PrecisionConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.runtime import RuntimeConfig
from navil_megatron.config.training import TrainingConfig
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.tokenizer import load_tokenizer
from navil_megatron.data.types import ALONE, IGNORED_LABEL, Microbatch, PackedRows, SampleId
from navil_megatron.files.checkpoint_folder import read_config
from navil_megatron.files.json_file import read_json
from navil_megatron.files.tokenizer_file import TOKENIZER_FILE
from navil_megatron.hf.compare import of_one_start
from navil_megatron.hf.exported.image_settings import image_settings_from_hf, preprocessor_config
from navil_megatron.hf.generate import open_picture
from navil_megatron.hf.hf_config import hf_config_from_model
from navil_megatron.hf.model_source import ModelSource, open_source
from navil_megatron.hf.remote_code.configuration_navil_chat import NaViLChatConfig
from navil_megatron.hf.remote_code.modeling_navil_chat import NaViL
from navil_megatron.hf.remote_code.processing_navil_chat import NaViLImageProcessor, NaViLProcessor
from navil_megatron.models.build import build_model
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import build_model_inputs

MAX_LOGIT_POSITIONS = 64
"""Logits are compared at so many last tokens of a prompt: one position of a large vocabulary is half a megabyte."""

LOGIT_TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit: other orders of float32 sums explain less."""

type Activations = dict[str, Tensor]
"""Place in the model -> what came out there, [tokens, width] in causal order; from the embeddings to the logits."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as model inputs; s tokens, p patches."""

    input_ids: Tensor  # [s]
    pixel_values: Tensor  # [p, 3, patch, patch]; empty without an image
    image_grid_thw: Tensor  # [num_scales, 3]

    @property
    def num_logits(self) -> int:
        """Tokens at its end of which logits are compared."""
        return min(MAX_LOGIT_POSITIONS, len(self.input_ids))


def compare_outputs(
    one: Path, other: Path, text: str, images: Sequence[Path], tokenizer: Path | None = None
) -> dict[str, Any]:
    """Runs a text alone, and after each image, through two of the same model, each a checkpoint or a NaViL folder.

    Without ``tokenizer``, the folder of one, that of either of the two is taken.

    Returns:
        ``places``: for each place, from the embeddings to the logits, the largest difference over all prompts and the
        largest magnitude; ``max_logit_difference``; ``same_next_token``: whether every compared position has the same
        likeliest next token; ``equal``: whether no logit differs by more than float32 sums explain.

    Raises:
        UserError: One of them is no whole NaViL, they are of different models, a picture cannot be read, or nothing
            names a tokenizer.
    """
    sources = [open_source(path) for path in (one, other)]
    models = []
    for source in sources:
        if source.model is None:
            raise UserError(f"{source.path} is a language model alone; --logits compares two NaViL models")
        model = of_one_start(source.model)
        models.append(replace(model, language=replace(model.language, max_position_embeddings=1 << 20)))
    if models[0] != models[1]:
        raise UserError(f"{one} and {other} are of different models; their outputs cannot be compared layer by layer")
    folder, data = _prompt_settings(sources, models[0], tokenizer)
    encode = partial(_encode, model=models[0], data=data, tokenizer=folder)
    prompts = [encode(text, []), *(encode(f"<image>\n{text}", [image]) for image in images)]
    first, second = (_run(source, models[0], prompts) for source in sources)
    places: list[dict[str, Any]] = []
    for name in max(first, key=len):  # a prompt with an image has all places
        pairs = [(a[name], b[name]) for a, b in zip(first, second, strict=True) if name in a]
        places.append(
            {
                "place": name,
                "max_difference": max(float((a - b).abs().max()) for a, b in pairs),
                "largest": max(float(a.abs().max()) for a, _ in pairs),
            }
        )
    tokens = [[found["logits"].argmax(-1) for found in outputs] for outputs in (first, second)]
    difference = places[-1]["max_difference"]
    return {
        "places": places,
        "max_logit_difference": difference,
        "same_next_token": all(map(torch.equal, *tokens)),
        "num_prompts": len(prompts),
        "num_images": len(images),
        "equal": difference <= LOGIT_TOLERANCE * places[-1]["largest"],
    }


def describe_outputs(report: Mapping[str, Any]) -> str:
    """The report for a terminal: one line for each place."""
    lines = [f"ran {report['num_prompts']} prompts, {report['num_images']} with an image; largest differences:"]
    lines += [
        f"  {place['place']:<20} {place['max_difference']:.3g} of values up to {place['largest']:.3g}"
        for place in report["places"]
    ]
    tokens = "the same" if report["same_next_token"] else "not the same"
    lines.append(f"outputs {'equal' if report['equal'] else 'differ'}; likeliest next tokens are {tokens} everywhere")
    return "\n".join(lines)


def _prompt_settings(
    sources: Sequence[ModelSource], model: ModelConfig, given: Path | None
) -> tuple[Path, Mapping[str, Any]]:
    """The tokenizer's folder and the image settings, by the first of the two that names a tokenizer."""
    for source in sources:
        if source.kind == "checkpoint":
            data = read_config(source.path).get("data") or {}
        else:
            data = image_settings_from_hf(source.path, read_json(source.path / "config.json"), model)
            data["tokenizer"] = str(source.path)
        folder = given or (Path(data["tokenizer"]) if data.get("tokenizer") else None)
        if folder is not None and (given or (folder / TOKENIZER_FILE).is_file()):
            return folder, data
    raise UserError(f"neither {sources[0].path} nor {sources[1].path} has a tokenizer; give one with --tokenizer")


def _encode(
    text: str, images: Sequence[Path], *, model: ModelConfig, data: Mapping[str, Any], tokenizer: Path
) -> Prompt:
    """A text, in which ``<image>`` stands for the next image, as training and export see it."""
    image_processor = NaViLImageProcessor(**preprocessor_config(data, model))
    processor = NaViLProcessor(image_processor, load_tokenizer(tokenizer, model.special_token_ids).hugging_face)
    try:
        inputs = processor(images=[open_picture(path) for path in images] or None, text=text)
    except ValueError as error:
        raise UserError(f"the prompt cannot be built ({error}): correct the text or the images") from None
    side = model.vision.patch_size
    return Prompt(
        inputs["input_ids"][0],
        inputs.get("pixel_values", torch.empty(0, 3, side, side)),
        inputs.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long)),
    )


@torch.no_grad()
def _run(source: ModelSource, model: ModelConfig, prompts: Sequence[Prompt]) -> list[Activations]:
    """What the model computes from each prompt."""
    found = []
    run = _run_training_model if source.kind == "checkpoint" else _run_exported_model
    for prompt, seen in zip(prompts, run(source, model, prompts), strict=True):
        # The decoder's input apart: what encoder and connector gave, and what the tables gave.
        is_image = prompt.input_ids == model.special_token_id("<IMG_CONTEXT>")
        embeddings = seen.pop("embeddings")
        images = {"image features": embeddings[is_image]} if is_image.any() else {}
        found.append(images | {"token embeddings": embeddings[~is_image]} | seen)
    return found


def _run_exported_model(source: ModelSource, model: ModelConfig, prompts: Sequence[Prompt]) -> Iterator[Activations]:
    """In the plain torch model of an export."""
    config = NaViLChatConfig(**hf_config_from_model(model, dtype="float32", token_ids={}, image_settings={}))
    with torch.device("meta"):
        plain = NaViL(config).eval()
    plain.to_empty(device="cpu")
    parameters = dict(plain.named_parameters())
    for key in source.signatures:
        for name, tensor in source.read(key).items():
            parameters[name].copy_(tensor)
    language = plain.language_model
    for prompt in prompts:
        images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        with _recorded(language, language.model["layers"], language.model["norm"]) as seen:
            result = plain(
                input_ids=prompt.input_ids[None],
                logits_to_keep=prompt.num_logits,
                use_cache=False,
                **(images if len(prompt.image_grid_thw) else {}),
            )
        yield {name: value[0] for name, value in seen.items()} | {"logits": result.logits[0].float()}


def _run_training_model(source: ModelSource, model: ModelConfig, prompts: Sequence[Prompt]) -> Iterator[Activations]:
    """In the megatron-core model, on one CPU rank that never trains."""
    with tempfile.TemporaryDirectory(prefix="navil-compare-") as logs:
        config = NaViLConfig(
            model=model,
            data=DataConfig(train_sources=(), tokenizer=""),
            training=TrainingConfig(train_steps=1, global_batch_size=1),
            precision=PrecisionConfig(type="fp32"),
            optimizer=OptimizerConfig(lr=0.0),
            checkpoint=CheckpointConfig(directory=logs),
            runtime=RuntimeConfig(device="cpu"),
            logging=LoggingConfig(directory=logs, tensorboard=False, progress=False),
        )
        with Session.start(config) as session:
            (chunk,) = build_model(config, session.groups, session.device)
            load_model(source.path, read_contents(source.path), [chunk])
            chunk.eval()
            for prompt in prompts:
                microbatch = _microbatch(prompt, model)
                decoder, inputs = chunk.decoder, build_model_inputs(microbatch)
                with _recorded(decoder.layers[0], decoder.layers, decoder.final_layernorm) as seen:
                    logits = chunk(replace(inputs, labels=None))
                # Back to causal order, from text tokens before visual ones.
                rows = torch.argsort(torch.from_numpy(np.argsort(microbatch.visual_token_mask, kind="stable")))
                yield {name: value[rows, 0] for name, value in seen.items()} | {"logits": logits.float()}


def _microbatch(prompt: Prompt, model: ModelConfig) -> Microbatch:
    """The prompt as the only sample of a row; labels mark where logits are wanted."""
    ids = prompt.input_ids.numpy()
    labels = np.full(ids.size, IGNORED_LABEL, dtype=np.int64)
    labels[-prompt.num_logits :] = 0
    rows = PackedRows(
        input_ids=ids,
        position_ids=np.arange(ids.size, dtype=np.int64),
        labels=labels,
        loss_weights=np.zeros(ids.size, dtype=np.float32),
        visual_token_mask=visual_tokens(ids, model.special_token_ids),
        segment_lengths=(ids.size,),
        image_grid_thw=prompt.image_grid_thw.numpy(),
        samples=(SampleId(0, 0),),
        sample_starts=(0,),
        sample_lengths=(ids.size,),
    )
    return plan_microbatch(rows, model, ALONE, prompt.pixel_values.flatten(1))


@contextmanager
def _recorded(first: nn.Module, layers: Iterable[nn.Module], norm: nn.Module) -> Iterator[Activations]:
    """What ``first`` is given and what layers and norm give, noted while the block runs."""
    seen: Activations = {}

    def record(module: nn.Module, name: str, of_input: bool = False) -> RemovableHandle:
        def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = (args[0] if args else kwargs["hidden_states"]) if of_input else output
            seen[name] = (value[0] if isinstance(value, tuple) else value).detach().float().clone()

        return module.register_forward_hook(note, with_kwargs=True, prepend=of_input)

    handles = [record(first, "embeddings", of_input=True), record(norm, "final norm")]
    handles += [record(layer, f"decoder layer {number}") for number, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
