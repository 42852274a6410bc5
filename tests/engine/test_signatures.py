"""The stand-in has the face of the compiled part: names, arguments, defaults, enumerations of the source package."""

import functools
import inspect
import re
from collections.abc import Callable
from enum import IntEnum

import pytest

from tests.engine.bindings import Bindings, read_bindings
from tests.engine.host import run_rehearsed
from tests.engine.load import ENGINE
from tests.engine.standin.calls import FUNCTIONS
from tests.engine.standin.enums import ENUMERATIONS
from tests.engine.standin.module import CLASSES

SOURCE = ENGINE / "source"


@functools.cache
def bindings() -> Bindings:
    return read_bindings(SOURCE)


def mismatches(functions: dict[str, Callable], enumerations: dict[str, type[IntEnum]]) -> list[str]:
    """What differs from the bindings, by name."""
    bound, found = bindings(), []
    for name, function in functions.items():
        if name not in bound.functions:
            found.append(f"{name} is not bound")
        elif list(inspect.signature(function).parameters.values()) != bound.functions[name]:
            bound_as = ", ".join(map(str, bound.functions[name]))
            found.append(f"{name}{inspect.signature(function)}, bound as ({bound_as})")
    for name, enumeration in enumerations.items():
        members = {member: int(value) for member, value in enumeration.__members__.items()}
        if members != bound.enumerations[name]:
            found.append(f"{name} {members}, bound as {bound.enumerations[name]}")
    return found


def test_source_is_of_the_installed_version() -> None:
    (metadata,) = ENGINE.glob("transformer_engine-*.dist-info/METADATA")
    versions = [
        re.search(r"^Version: (\S+)$", path.read_text(), re.MULTILINE) for path in (metadata, SOURCE / "PKG-INFO")
    ]
    assert versions[0] and versions[1] and versions[0][1] == versions[1][1]


def test_functions_and_enumerations_are_as_bound() -> None:
    assert mismatches(FUNCTIONS, ENUMERATIONS) == []
    assert set(ENUMERATIONS) == set(bindings().enumerations)
    assert set(CLASSES) <= bindings().classes


def other_name(tensor, quantiser, output=None, noop=None) -> None: ...


def other_default(tensor, quantizer, output=None, noop=False) -> None: ...


def other_order(quantizer, tensor, output=None, noop=None) -> None: ...


def by_name(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma) -> None: ...


@pytest.mark.parametrize(
    ("name", "function"),
    [("quantize", other_name), ("quantize", other_default), ("quantize", other_order), ("rmsnorm_bwd", by_name)],
)
def test_an_upgrade_would_be_noticed(name: str, function: Callable) -> None:
    (problem,) = mismatches({name: function}, {})
    assert problem.startswith(name)
    assert mismatches({"gone": function}, {}) == ["gone is not bound"]
    assert len(mismatches({}, {"DType": IntEnum("DType", "kByte kInt32")})) == 1


def names_without_meaning(rank: int, world_size: int) -> list[str]:
    import transformer_engine_torch

    return sorted(transformer_engine_torch.unwritten)


def test_what_their_python_imports_is_bound() -> None:
    """Nothing that the stand-in made up on the way, and few enough that a new one is seen."""
    (names,) = run_rehearsed(1, names_without_meaning)
    assert set(names) <= set(bindings().functions)
    assert not set(names) & set(FUNCTIONS)
