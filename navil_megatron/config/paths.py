"""Settings that are paths: marked at their field, and relative to the config file that states them."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

_PATH = "a path, relative to the config that states it"

LocalPath = Annotated[str, _PATH]
"""A path: a relative one is meant from the folder of its config file, or, in an override, from where it is typed."""


def under(folder: Path, section: type[Any], values: Any) -> Any:
    """The values of a section with its paths as seen from the working folder, ``folder`` being the config's own.

    What is no value of the section stays as it is, for the reader to refuse.
    """
    if not isinstance(values, Mapping):
        return values
    hints = get_type_hints(section, include_extras=True)
    return {name: _under(folder, hints.get(name), value) for name, value in values.items()}


def _under(folder: Path, annotation: Any, value: Any) -> Any:
    origin = get_origin(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return under(folder, annotation, value)
    if origin is tuple and isinstance(value, list):
        return [_under(folder, get_args(annotation)[0], item) for item in value]
    if origin in (Union, UnionType):
        return value if value == "none" else _under(folder, get_args(annotation)[0], value)
    if annotation == LocalPath and isinstance(value, str) and "://" not in value:
        return os.path.normpath(folder / value)
    return value
