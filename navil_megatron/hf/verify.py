"""Accounting: every tensor that should be there is, under its name, shape and type, and none besides."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from navil_megatron.blueprint.parameters import Shape, checkpoint_shapes
from navil_megatron.config.errors import UserError
from navil_megatron.config.load import section_from_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.validate import model_problems
from navil_megatron.files.checkpoint_folder import CONFIG_FILE, read_config
from navil_megatron.hf.param_map import hf_shapes, table

WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that weights may have."""
MOST_LAYERS, LARGEST_SIZE = 10_000, 1 << 31
"""Beyond any model: a config with more is damaged, and would only be worked on for ever."""
MOST_EXPERTS = 50_000
"""Layers times experts of a modality, likewise."""

Signature = tuple[Shape, torch.dtype | str]
"""Shape and type of a tensor; a type that torch does not have is a name."""


def type_name(dtype: torch.dtype | str) -> str:
    """E.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def require_valid_model(model: ModelConfig, where: str) -> None:
    """Refuses a model section with sizes that no model has, before anything is planned by it.

    Raises:
        UserError: It is not valid; one message names all problems.
    """
    problems = [
        f"model.{part}.{name} = {value} is larger than any model's"
        for part, section in (("language", model.language), ("vision", model.vision))
        for name in section.__dataclass_fields__
        if type(value := getattr(section, name)) is int
        and value > (MOST_LAYERS if name == "num_layers" else LARGEST_SIZE)
    ]
    experts = model.language.num_layers * model.language.num_experts
    if not problems and experts > MOST_EXPERTS:
        problems = [f"model.language has {experts} experts in all its layers, more than any model's"]
    problems = problems or model_problems(model)
    if problems:
        raise UserError(f"{where} describes no model that works: {'; '.join(problems)}")


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model section of a checkpoint's config.

    Raises:
        UserError: It is missing or wrong.
    """
    where = str(checkpoint / CONFIG_FILE)
    model = section_from_dict(ModelConfig, read_config(checkpoint)["model"], where)
    require_valid_model(model, where)
    return model


def require_weight_type(dtype: torch.dtype | None) -> None:
    """Refuses a type that weights cannot have."""
    if dtype is not None and dtype not in WEIGHT_TYPES:
        raise UserError(f"dtype {type_name(dtype)} is not supported, only {', '.join(map(type_name, WEIGHT_TYPES))}")


def require_hf_tensors(found: Mapping[str, Signature], model: ModelConfig, where: str, casting: bool = False) -> None:
    """Checks the tensors of HF files against the table.

    Args:
        found: Shape and type under each key.
        model: The model that they should be.
        where: Names the folder in the message.
        casting: All tensors are about to be cast to one type, so layers may differ in theirs.

    Raises:
        UserError: Anything is missing, unknown or of another shape or type; one message names them all.
    """
    problems = list(_differences(found, hf_shapes(model)))
    if not casting:
        problems += _mixed_types(found, model)
    _refuse(problems, where)


def require_mcore_tensors(found: Mapping[str, Signature], model: ModelConfig, where: str) -> None:
    """Checks the model's tensors of a checkpoint against the table.

    Raises:
        UserError: As ``require_hf_tensors``.
    """
    _refuse(list(_differences(found, checkpoint_shapes(model))), where)


def require_tensors(
    found: Mapping[str, Signature], expected: Mapping[str, Shape], where: str, ignored: Collection[str] = ()
) -> None:
    """Checks tensors against any list of shapes; ``ignored`` keys may be there too.

    Raises:
        UserError: As ``require_hf_tensors``.
    """
    _refuse(list(_differences({key: found[key] for key in found if key not in ignored}, expected)), where)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in type, shape and every bit, NaN payloads and signed zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def summary(found: Mapping[str, Signature], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Counts of a set of tensors for a report; ``dtype``: the type that they are cast to."""
    sizes = {key: torch.Size(shape).numel() for key, (shape, _) in found.items()}
    types = {key: dtype or stored for key, (_, stored) in found.items()}
    return {
        "num_tensors": len(found),
        "num_parameters": sum(sizes.values()),
        "num_bytes": sum(sizes[key] * kind.itemsize for key, kind in types.items() if isinstance(kind, torch.dtype)),
        "types": sorted(set(map(type_name, types.values()))),
    }


def _differences(found: Mapping[str, Signature], expected: Mapping[str, Shape]) -> Iterator[str]:
    for key in sorted(expected.keys() - found.keys()):
        yield f"{key} {list(expected[key])} is missing"
    for key in sorted(found.keys() - expected.keys()):
        yield f"{key} {list(found[key][0])} is unknown"
    for key in sorted(found.keys() & expected.keys()):
        shape, dtype = found[key]
        if shape != expected[key]:
            yield f"{key} is {list(shape)}, expected {list(expected[key])}"
        if dtype not in WEIGHT_TYPES:
            yield f"{key} has type {type_name(dtype)}, expected {', '.join(map(type_name, WEIGHT_TYPES))}"


def _mixed_types(found: Mapping[str, Signature], model: ModelConfig) -> Iterator[str]:
    """Tensors that become one in the checkpoint must have one type, or joining them would silently change some."""
    for row in table(model):
        types = {found[key][1] for keys in row.hf_keys_of_layers() for key in keys if key in found}
        if len(types) > 1:
            names = ", ".join(sorted(map(type_name, types)))
            yield f"{', '.join(row.hf_keys)} have several types ({names}) over the layers; choose one with dtype"


def _refuse(problems: list[str], where: str) -> None:
    if problems:
        raise UserError(
            f"{where} does not fit its config, {len(problems)} problem(s): {'; '.join(problems)}; "
            "nothing was written; correct the config or the weights"
        )
