"""Whether two models are the same: the settings that decide what they compute, and every bit of every tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.load import config_to_dict, differing_settings
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.worker_pool import Meter, OnProgress
from navil_megatron.hf.convert import ahead
from navil_megatron.hf.model_source import ModelSource, open_source
from navil_megatron.hf.verify import is_finite, same_bits, size_of, type_name

SHOWN = 10
"""Differences that are listed one by one."""


def compare_weights(one: Path, other: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Compares two models, each a checkpoint or a folder, tensor by tensor; ``on_progress`` is told the bytes read.

    Gives what was found, ready for JSON; ``equal`` says whether there is any difference, ``finite`` whether every
    number of the shared tensors is one.

    Raises:
        UserError: One of them is incomplete or damaged.
    """
    sources = (open_source(one), open_source(other))
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


def of_one_start(model: ModelConfig) -> ModelConfig:
    """The model with one value for each setting that says how weights start, not what is computed from them."""
    language = replace(model.language, init_std=0.0, visual_expert_init="copy")
    return replace(model, language=language, vision=replace(model.vision, init_std=0.0, layer_scale_init=0.0))


def _tensors(source: ModelSource, keys: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
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
