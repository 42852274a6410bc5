"""What the C++ of ``transformer-engine-torch`` gives to Python: functions with their arguments, enumerations, classes.

Read from the text of the source package: ``pybind.cpp``, the header with the bindings that all frameworks share, and
the headers that declare what is bound without names of arguments.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import Parameter
from pathlib import Path
from typing import Any


@dataclass
class Bindings:
    """All that the module has, by name."""

    functions: dict[str, list[Parameter]] = field(default_factory=dict)
    enumerations: dict[str, dict[str, int]] = field(default_factory=dict)
    classes: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Default:
    """An argument's default that has no meaning in Python, as it is written in C++."""

    text: str


def read_bindings(source: Path) -> Bindings:
    """Of an unpacked source package."""
    headers = source / "common_headers" / "common"
    declared = "".join(
        _text(path)
        for path in (
            *sorted((headers / "include").rglob("*.h")),
            source / "csrc" / "common.h",
            source / "csrc" / "extensions.h",
        )
    )
    bound = _text(source / "csrc" / "extensions" / "pybind.cpp") + _text(headers / "util" / "pybind_helper.h")
    found = Bindings(classes=set(re.findall(r'\(\s*m,\s*"(\w+)"(?:,[^;]*?)?\)\s*\.def\(py::init', bound)))
    for inside in _calls(bound, "m.def("):
        name, function, *rest = _split(inside)
        found.functions[ast.literal_eval(name)] = _parameters(function, rest, declared)
    values = dict(_enumerators(declared))
    for opening in re.finditer(r'enum_<[\w:]+>\(\s*m,\s*"(\w+)"[^;]*;', bound):
        members = re.findall(r'\.value\("(\w+)",\s*([\w:]+)\)', opening[0])
        found.enumerations[opening[1]] = {name: values[value.split("::")[-1]] for name, value in members}
    return found


def _text(path: Path) -> str:
    """Without comments and without the ends of lines of macros."""
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text).replace("\\\n", "\n")


def _calls(text: str, opening: str) -> Iterator[str]:
    """What stands between the brackets of every call."""
    for start in re.finditer(rf"(?<!\w){re.escape(opening)}", text):
        yield _bracketed(text[start.end() :])


def _bracketed(text: str) -> str:
    """Up to the bracket that closes what was opened before."""
    depth = 1
    for place, quoted, letter in _letters(text):
        depth += 0 if quoted else (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return text[:place]
    raise ValueError(f"no end of {text[:60]!r}")


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for place, quoted, letter in _letters(text):
        if quoted:
            continue
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _letters(text: str) -> Iterator[tuple[int, bool, str]]:
    """Place, whether it is part of a string, letter."""
    quoted = False
    for place, letter in enumerate(text):
        quoted ^= letter == '"'
        yield place, quoted, letter


def _parameters(function: str, rest: list[str], declared: str) -> list[Parameter]:
    """By the names that are given to arguments; without any, by the declaration, and then by position alone."""
    parameters, kind = [], Parameter.POSITIONAL_OR_KEYWORD
    for part in rest:
        if part == "py::kw_only()":
            kind = Parameter.KEYWORD_ONLY
        named = re.fullmatch(r'py::arg\("(\w+)"\)(?:\s*=\s*(.*))?', part, re.DOTALL)
        if named:
            default = Parameter.empty if named[2] is None else _default(named[2])
            parameters.append(Parameter(named[1], kind, default=default))
    if not parameters and not function.startswith("["):
        name = function.lstrip("&").split("::")[-1]
        (inside,) = {" ".join(found.split()) for found in _calls(declared, f"{name}(")}
        for argument in _split(inside):
            # Defaults of C++ are none of Python's.
            argument = argument.partition("=")[0].strip()
            parameters.append(Parameter(re.findall(r"\w+", argument)[-1], Parameter.POSITIONAL_ONLY))
    return parameters


def _default(text: str) -> Any:
    text = text.strip()
    words = {"py::none()": None, "nullptr": None, "std::nullopt": None, "true": True, "false": False}
    if text in words:
        return words[text]
    if re.fullmatch(r"-?[\d.]+f?", text):
        return ast.literal_eval(text.rstrip("f"))
    return Default(text)


def _enumerators(text: str) -> Iterator[tuple[str, int]]:
    """Name and value of every member of every enumeration."""
    for body in re.finditer(r"\benum\b[^{;()]*\{([^}]*)\}", text):
        value = -1
        for member in _split(body[1]):
            name, _, given = (part.strip() for part in member.partition("="))
            value = int(given) if given else value + 1
            yield name, value
