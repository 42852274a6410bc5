"""Accounting: every tensor that should be there is, under its name, shape and type, and none besides."""

from collections.abc import Iterator, Mapping

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import ModelConfig
from navil_megatron.hf.param_map import Shape, hf_shapes, mcore_shapes, table

WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that weights may have."""

Signature = tuple[Shape, torch.dtype]


def type_name(dtype: torch.dtype) -> str:
    """E.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


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
    _refuse(list(_differences(found, mcore_shapes(model))), where)


def require_same_tensors(written: Mapping[str, torch.Tensor], intended: Mapping[str, torch.Tensor], where: str) -> None:
    """Reads back what was written and compares it bit by bit.

    Raises:
        RuntimeError: A tensor came back different: the disk or a library failed, not the user.
    """
    if written.keys() != intended.keys():
        raise RuntimeError(
            f"{where} holds other keys than were written: {sorted(written.keys() ^ intended.keys())[:5]}"
        )
    for key, tensor in intended.items():
        if not same_bits(written[key], tensor):
            raise RuntimeError(f"{where}: {key} reads back different from what was written; the disk may be failing")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in type, shape and every bit, NaN payloads and signed zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


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
