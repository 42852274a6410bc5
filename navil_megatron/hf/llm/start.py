"""A pretrained language model as the start of a NaViL: its weights for the text experts, the rest copied or drawn.

docs/convert.md says what each part starts as. Under the released 2B's composed output projection W_visual(W_text x) the
visual copy that does as the text expert does is the identity; a start composes nothing unless the run's config says so.
What is drawn has a generator for each layer of each parameter, so any order of jobs and any number of processes draw
the same.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from navil_megatron.blueprint.parameters import EMBEDDING, HEAD
from navil_megatron.config.errors import UserError
from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.load import config_to_dict, section_from_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf.hf_config import MODEL_TYPE, ordered_ids
from navil_megatron.hf.hf_parameters import HFParameter, Slot, hf_parameters
from navil_megatron.hf.jobs import Job
from navil_megatron.hf.llm.families import HF_FAMILIES
from navil_megatron.hf.llm.language_config import language_from_hf, language_problems
from navil_megatron.hf.llm.start_values import draw, identity, take, take_table
from navil_megatron.hf.verify import require_valid_model

LLM_PREFIX = "language_model."
"""Stands before the LLM's own names in a NaViL's files."""
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.(self_attn|attention)\.)?rotary_emb\.(original_)?inv_freq")
_FREE = ("visual_expert_init", "modality_experts", "init_std", "composed_visual_output_projection")
"""Settings of the language section that an LLM does not decide."""


def is_bare_llm(config_json: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a language model alone, of a supported family or not."""
    kind = config_json.get("model_type")
    sections = {"llm_config", "vision_config", "text_config"}
    return isinstance(kind, str) and kind != MODEL_TYPE and not sections & config_json.keys()


def model_config_for_llm(
    config_json: Mapping[str, Any], wanted: Mapping[str, Any], special_token_ids: Mapping[str, int] | tuple[int, ...]
) -> ModelConfig:
    """The model that starts from a pretrained LLM, by its ``config.json`` and the run's ``[model]`` table (``wanted``).

    The table holds the encoder's settings. What it says about the language model must agree with the LLM, and it may
    say nothing. A ``vocab_size`` larger than needed is taken. The ids of the 12 special tokens are given by name or in
    the order of ``SPECIAL_TOKENS``.

    Raises:
        UserError: The LLM asks for something that the model does not have, or the two disagree; all problems at once.
    """
    family = config_json.get("model_type")
    if family not in HF_FAMILIES:
        raise UserError(f"the LLM's config.json has model_type {family!r}, supported: {', '.join(sorted(HF_FAMILIES))}")
    _refuse("the LLM's config.json cannot be used", [*_llm_problems(config_json, family)])
    language = language_from_hf(
        config_json, family, composed=False, default_theta=10_000.0, source="the LLM's config.json"
    )
    ids = ordered_ids(special_token_ids)
    num_needed = max(language.vocab_size, max(ids) + 1)
    tables = dict(wanted)
    stated = tables.pop("language", {})
    if not isinstance(stated, Mapping):
        raise UserError(f"model.language is {stated!r}, expected a table [model.language]")
    problems, stated_ids = [*_disagreements(stated, language, num_needed)], tables.pop("special_token_ids", ids)
    if not isinstance(stated_ids, list | tuple) or tuple(stated_ids) != ids:
        found = f"model.special_token_ids is {stated_ids!r}, but the tokenizer has {list(ids)}"
        problems.append(f"{found}; remove it or set it so")
    _refuse("the run's config does not fit the LLM", problems)
    values = config_to_dict(language) | {name: stated[name] for name in _FREE if name in stated}
    values["vocab_size"] = stated.get("vocab_size", num_needed)
    tables |= {"language": values, "special_token_ids": list(ids)}
    model = section_from_dict(ModelConfig, tables, "the run's [model]")
    require_valid_model(model, "the LLM with the run's [model]")
    return model


def llm_start_jobs(
    config_json: Mapping[str, Any], model: ModelConfig, *, seed: int, dtype: torch.dtype, stored: Collection[str] = ()
) -> list[Job]:
    """From a pretrained LLM's folder to a checkpoint of ``model_config_for_llm``, all of one type.

    ``seed`` decides what is drawn. A head that is ``stored`` beside the embedding table it is tied to is read too, and
    refused by its job if it differs.
    """
    language = model.language
    tied_head = f"{HF_FAMILIES[language.family].head}.weight"
    tied = [tied_head] if language.tied_embeddings and tied_head in stored else []
    copies = language.visual_expert_init == "copy"

    def jobs_of(found: HFParameter, target: Slot, theirs: tuple[Slot, ...]) -> Iterator[Job]:
        """What fills one layer of one parameter; nothing for a visual expert that its text expert fills."""
        parameter = found.parameter
        sources = tuple(replace(slot, key=slot.key.removeprefix(LLM_PREFIX)) for slot in theirs)
        composed = language.composed_visual_output_projection and ".linear_proj." in parameter.key
        if sources == theirs or (parameter.modality == "visual" and not copies):
            yield Job((), (target,), partial(draw, parameter=parameter, layer=target.layer, seed=seed), dtype)
        elif parameter.modality == "visual":
            if composed:
                yield Job((), (target,), partial(identity, size=language.hidden_size), dtype)
        elif parameter.key in (EMBEDDING, HEAD):
            shape = (config_json["vocab_size"], language.hidden_size)
            tables = tuple(Slot(key, shape) for key in [sources[0].key, *tied])
            yield Job(tables, (target,), partial(take_table, num_rows=language.vocab_size, dtype=dtype), dtype)
        else:
            filled = [target]
            if copies and parameter.modality == "text" and not composed:
                filled.append(replace(target, key=target.key.replace(".text.", ".visual.")))
            taken = partial(take, transform=found.transform, model=model, copies=len(filled))
            yield Job(sources, tuple(filled), taken, dtype)

    return [job for found in hf_parameters(model) for slots in found.slots(model) for job in jobs_of(found, *slots)]


def ignored_llm_tensors(stored: Collection[str]) -> set[str]:
    """Keys of an LLM's folder that are rightly left unread: rotary frequencies, which follow from its config."""
    return {key for key in stored if _ROTARY_BUFFER.fullmatch(key)}


def _llm_problems(config_json: Mapping[str, Any], family: str) -> Iterator[str]:
    names = HF_FAMILIES[family]
    architecture = (config_json.get("architectures") or [names.llm_architecture])[0]
    if architecture != names.llm_architecture:
        yield f"architectures is {architecture!r}, expected {names.llm_architecture!r}"
    yield from (f"{key} is missing" for key in names.stated if config_json.get(key) is None)
    yield from language_problems(config_json, family)
    if config_json.get("attention_dropout"):
        yield f"attention_dropout is {config_json['attention_dropout']!r}, supported: 0.0"
    # Qwen's switch stands beside the window; the window of a config without one is in use.
    in_use = config_json.get("use_sliding_window", True)
    if in_use and config_json.get("sliding_window") is not None:
        yield f"sliding_window is {config_json['sliding_window']!r} and in use, supported: none"


def _disagreements(stated: Mapping[str, Any], language: LanguageConfig, num_needed: int) -> Iterator[str]:
    of_the_llm = config_to_dict(language)
    for name, value in stated.items():
        if name in _FREE:
            continue
        if name not in of_the_llm:
            yield f"model.language.{name} is not a setting"
        elif name == "vocab_size":
            if not isinstance(value, int) or value < num_needed:
                yield f"model.language.vocab_size is {value!r}, but {num_needed} rows are needed; remove it or raise it"
        elif value != of_the_llm[name] and (value, of_the_llm[name]) != ("none", None):
            yield f"model.language.{name} is {value!r}, but the LLM has {of_the_llm[name]!r}; remove it or set it so"


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        raise UserError(f"{what}, {len(problems)} problem(s): {'; '.join(problems)}")
