"""Whether two models are the same: the settings that decide what they compute, and every bit of every tensor."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from navil_megatron.blueprint.parameters import Shape
from navil_megatron.config.load import config_to_dict, differing_settings
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.worker_pool import Meter, OnProgress
from navil_megatron.hf.convert import ahead
from navil_megatron.hf.llm.families import HF_FAMILIES
from navil_megatron.hf.llm.start import LLM_PREFIX, ignored_llm_tensors
from navil_megatron.hf.model_source import ModelSource, open_source
from navil_megatron.hf.verify import Signature, is_finite, same_bits, size_of, type_name

_VISUAL = re.compile(r"_ve\.")
"""In the name of a tensor of a visual expert."""
SHOWN = 10
"""Differences that are listed one by one."""


def compare_weights(one: Path, other: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Compares two models, each a checkpoint or a folder, tensor by tensor; ``on_progress`` is told the bytes read.

    A bare LLM is compared with what a NaViL has of one: text experts, norms, tables and head, without added rows. Gives
    what was found, ready for JSON; ``equal`` says whether there is any difference, ``finite`` whether every number of
    the shared tensors is one.

    Raises:
        UserError: One of them is incomplete or damaged.
    """
    opened = (open_source(one), open_source(other))
    kinds = [source.kind == "LLM folder" for source in opened]
    sources = _of_llm(opened, kinds.index(True)) if any(kinds) and not all(kinds) else opened
    first, second = (source.signatures for source in sources)
    shared = [key for key in first if key in second]
    meter = Meter(sum(size_of(headers[key])[1] for headers in (first, second) for key in shared), on_progress)
    verdicts: list[dict[str, Any] | torch.dtype | None] = []
    not_finite: list[str] = []
    for (key, mine), (_, theirs) in zip(_tensors(sources[0], shared), _tensors(sources[1], shared), strict=True):
        verdicts.append(_verdict(key, mine, theirs))
        if not (is_finite(mine) and is_finite(theirs)):
            not_finite.append(key)
        meter.add(mine.nbytes + theirs.nbytes)
    casts = [type_name(verdict) for verdict in verdicts if isinstance(verdict, torch.dtype)]
    differences = [verdict for verdict in verdicts if isinstance(verdict, dict)]
    settings = _config_differences(sources[0].model, sources[1].model)
    missing = [sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())]
    return {
        "first": {"kind": sources[0].kind, "path": str(sources[0].path)},
        "second": {"kind": sources[1].kind, "path": str(sources[1].path)},
        "compared": "everything" if sources is opened else "what an LLM has: text experts, norms, tables, head",
        "equal": not (settings or casts or differences or any(missing)),
        "finite": not not_finite,
        "not_finite": not_finite,
        "config_differences": settings,
        "num_equal": verdicts.count(None),
        "num_equal_after_cast": len(casts),
        "equal_after_casting_to": sorted(set(casts)),
        "num_different": len(differences),
        "only_in_first": missing[0],
        "only_in_second": missing[1],
        "differences": differences[:SHOWN],
    }


def describe_weights(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{report[side]['path']} ({report[side]['kind']})" for side in ("first", "second")]
    if report["compared"] != "everything":
        lines.append(f"compared: {report['compared']}")
    only = {side: report[f"only_in_{side}"] for side in ("first", "second")}
    lines.append(
        f"{report['num_equal']} tensors equal, {report['num_different']} different, "
        f"{len(only['first'])} only in the first, {len(only['second'])} only in the second"
    )
    if report["num_equal_after_cast"]:
        names = " or ".join(report["equal_after_casting_to"])
        lines.append(f"{report['num_equal_after_cast']} tensors of another type, equal after casting to {names}")
    lines += [f"{key}: not finite" for key in report["not_finite"][:SHOWN]]
    lines += [f"config: {line}" for line in report["config_differences"]]
    for entry in report["differences"]:
        distance = entry["max_abs_difference"]
        lines.append(f"{entry['key']}: {entry['what']}" + ("" if distance is None else f" by at most {distance:.3g}"))
    for side, keys in only.items():
        lines += [f"{key}: only in the {side}" for key in keys[:SHOWN]]
    number = len(report["not_finite"])
    lines.append(("equal" if report["equal"] else "not equal") + (f", {number} tensors not finite" if number else ""))
    return "\n".join(lines)


@dataclass(frozen=True)
class _Part:
    """Some tensors of a source, under other names; of tables the first rows."""

    source: ModelSource
    names: Mapping[str, str]
    """Name here -> name there."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Name here -> rows of a table."""

    kind = property(lambda self: self.source.kind)
    path = property(lambda self: self.source.path)
    model = property(lambda self: None)  # an LLM's settings are no NaViL's

    @cached_property
    def signatures(self) -> dict[str, Signature]:
        """Shape and type of every tensor."""
        found = {here: self.source.signatures[there] for here, there in self.names.items()}
        cut = {key: ((rows, *found[key][0][1:]), found[key][1]) for key, rows in self.rows.items()}
        return found | cut

    @cached_property
    def jobs(self) -> dict[str, Any]:
        """What makes each tensor; empty for a folder."""
        return {here: self.source.jobs[there] for here, there in self.names.items() if there in self.source.jobs}

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """As of the source."""
        made = self.source.read(self.names[key])
        return {here: made[there][: self.rows.get(here)] for here, there in self.names.items() if there in made}


def _of_llm(sources: tuple[ModelSource, ModelSource], llm: int) -> tuple[_Part, _Part]:
    """A bare LLM, the one with this number, and the same tensors of a NaViL."""
    theirs, ours = sources[llm], sources[1 - llm]
    unread = ignored_llm_tensors(theirs.signatures)
    kept = {key: key.removeprefix(LLM_PREFIX) for key in ours.signatures if key.startswith(LLM_PREFIX)}
    text = {here: there for here, there in kept.items() if not _VISUAL.search(there)}
    # A head that is tied to the embedding table may be stored beside it.
    tied = ours.model is not None and ours.model.language.tied_embeddings
    heads = {f"{family.head}.weight" for family in HF_FAMILIES.values()} if tied else set()
    of_llm = {LLM_PREFIX + key: key for key in theirs.signatures if key not in unread | heads}
    of_navil = {here: here for here in text if here not in {LLM_PREFIX + head for head in heads}}
    shapes = {here: theirs.signatures[there][0] for here, there in of_llm.items() if here in of_navil}
    longer = {here: shape[0] for here, shape in shapes.items() if _is_longer(ours.signatures[here][0], shape)}
    bare, whole = _Part(theirs, of_llm), _Part(ours, of_navil, longer)
    return (whole, bare) if llm else (bare, whole)


def _is_longer(shape: Shape, of_llm: Shape) -> bool:
    """Whether it is the same table with rows that the LLM's has not."""
    return len(shape) == len(of_llm) == 2 and shape[1:] == of_llm[1:] and shape[0] > of_llm[0]


def of_one_start(model: ModelConfig) -> ModelConfig:
    """The model with one value for each setting that says how weights start, not what is computed from them."""
    language = replace(model.language, init_std=0.0, visual_expert_init="copy")
    return replace(model, language=language, vision=replace(model.vision, init_std=0.0, layer_scale_init=0.0))


def _tensors(source: ModelSource | _Part, keys: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in the order of the keys; what is made of the same source is read once."""
    together = (list(group) for _, group in groupby(keys, lambda key: id(source.jobs[key]) if source.jobs else key))
    for group, tensors in ahead(together, lambda group: source.read(group[0])):
        for key in group:
            shape, _ = source.signatures[key]
            if tensors[key].shape != shape:
                raise RuntimeError(f"{key} is {list(tensors[key].shape)}, its header says {list(shape)}")
            yield key, tensors[key]


def _verdict(key: str, mine: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any] | torch.dtype | None:
    """What differs, or the type after a cast to which nothing does; ``None``: every bit is equal."""
    if mine.shape != theirs.shape:
        return {"key": key, "what": f"{list(mine.shape)} and {list(theirs.shape)}", "max_abs_difference": None}
    narrow = min(mine.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    if same_bits(mine.to(narrow), theirs.to(narrow)):
        return None if mine.dtype == theirs.dtype else narrow
    types = "" if mine.dtype == theirs.dtype else f"{type_name(mine.dtype)} and {type_name(theirs.dtype)}, and "
    return {"key": key, "what": f"{types}differs", "max_abs_difference": _distance(mine, theirs)}


def _distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference; in blocks, so that a table of embeddings is not held in double precision."""
    blocks = zip(mine.reshape(-1).split(1 << 24), theirs.reshape(-1).split(1 << 24), strict=True)
    return max((float((one.double() - other.double()).abs().max()) for one, other in blocks), default=0.0)


def _config_differences(one: ModelConfig | None, other: ModelConfig | None) -> list[str]:
    if one is None or other is None:
        return []
    mine, theirs = (config_to_dict(of_one_start(model)) for model in (one, other))
    return [f"{name} is {a!r} and {b!r}" for name, a, b in differing_settings("model", mine, theirs)]
