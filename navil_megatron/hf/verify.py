"""Accounting: every tensor that should be there is, under its name, shape and type, and none besides."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from navil_megatron.blueprint.parameters import Shape
from navil_megatron.config.errors import UserError
from navil_megatron.config.load import section_from_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.validate import model_problems
from navil_megatron.files.checkpoint_folder import CONFIG_FILE, read_config
from navil_megatron.hf.hf_parameters import hf_parameters

WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that weights may have."""
MOST_LAYERS, LARGEST_SIZE = 10_000, 1 << 31
"""Beyond any model: a config with more is damaged, and would only be worked on for ever."""
MOST_EXPERTS = 50_000
"""Layers times experts of a modality, likewise."""

type Type = torch.dtype | str
"""A type that torch does not have is a name."""
type Signature = tuple[Shape, Type]
"""Shape and type of a tensor."""


def type_name(dtype: Type) -> str:
    """E.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


WEIGHT_TYPE_NAMES = ", ".join(map(type_name, WEIGHT_TYPES))


def size_of(signature: Signature) -> tuple[int, int]:
    """Numbers and bytes of a tensor; no bytes where torch does not have its type."""
    shape, dtype = signature
    numel = torch.Size(shape).numel()
    return numel, numel * dtype.itemsize if isinstance(dtype, torch.dtype) else 0


def require_valid_model(model: ModelConfig, where: str) -> None:
    """Refuses a model section with sizes that no model has, before anything is made of it.

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


def require_tensors(
    found: Mapping[str, Signature],
    expected: Mapping[str, Shape],
    where: str,
    *,
    ignored: Collection[str] = (),
    others: Iterable[str] = (),
) -> None:
    """Checks the tensors of a folder (``where``) against the shapes that they should have.

    Keys that are ``ignored`` may be there too; ``others`` are problems that were found elsewhere.

    Raises:
        UserError: Anything is missing, unknown or of another shape or type; one message names them all.
    """
    keys = found.keys() - set(ignored)
    problems = [f"{key} {list(expected[key])} is missing" for key in sorted(expected.keys() - keys)]
    problems += [f"{key} {list(found[key][0])} is unknown" for key in sorted(keys - expected.keys())]
    for key in sorted(keys & expected.keys()):
        shape, dtype = found[key]
        if shape != expected[key]:
            problems.append(f"{key} is {list(shape)}, expected {list(expected[key])}")
        if dtype not in WEIGHT_TYPES:
            problems.append(f"{key} has type {type_name(dtype)}, expected {WEIGHT_TYPE_NAMES}")
    if problems := [*problems, *others]:
        raise UserError(
            f"{where} does not fit its config, {len(problems)} problem(s): {'; '.join(problems)}; "
            "nothing was written; correct the config or the weights"
        )


def mixed_types(found: Mapping[str, Signature], model: ModelConfig) -> Iterator[str]:
    """Tensors that become one in the checkpoint must have one type, or joining them would silently change some."""
    for parameter in hf_parameters(model):
        keys = [slot.key for _, theirs in parameter.slots(model) for slot in theirs]
        types = {found[key][1] for key in keys if key in found}
        if len(types) > 1:
            names = ", ".join(sorted(map(type_name, types)))
            yield f"{', '.join(parameter.keys)} have several types ({names}) over the layers; choose one with dtype"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of it is infinite or none; the least and the largest say so, without a copy of the tensor."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in type, shape and every bit, NaN payloads and signed zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))
