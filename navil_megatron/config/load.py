"""TOML files and ``section.field=value`` overrides -> NaViLConfig, and back to plain tables.

Everything follows from the dataclasses' annotations: no field is named here. All problems of a config are reported at
once. TOML has no null, so the string ``"none"`` switches off a setting that may be ``None``. A file lies over those
that its ``extends`` names, table by table, and a later file over an earlier one.
"""

import dataclasses
import difflib
import json
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from navil_megatron.config.errors import ConfigError
from navil_megatron.config.paths import under
from navil_megatron.config.renamed import RENAMED
from navil_megatron.config.run import NaViLConfig

_INVALID: Any = object()  # stands for a value whose problem has been noted

EXTENDS = "extends"
"""Key at the top of a config: the path of another one, or several, that it lies over; relative to the file."""
_MAX_INT = 2**63 - 1
"""What TOML asks a reader to take; Python's takes more."""
_NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_PLURALS = {bool: "booleans", int: "integers", float: "numbers", str: "strings"}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> NaViLConfig:
    """Reads a run's config.

    Args:
        path: TOML file whose tables are the sections: ``[model.language]``, ``[optimizer]``, ...
        overrides: ``section.field=value``, the value parsed as TOML; what is not valid TOML is taken as a string. Or
            ``FILE.toml``: another config, laid over what came before it.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong. ``validate`` checks what spans sections.
    """
    reader = _Reader(NaViLConfig, str(path))
    return reader.read(reader.tables(Path(path), overrides))


def load_tables(path: Path | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A config as written, with its overrides and without a check: for those who need a part of it.

    Raises:
        ConfigError: the file cannot be read, or an override has no place.
    """
    reader = _Reader(NaViLConfig, str(path))
    tables = reader.tables(path, overrides)
    if reader.problems:
        raise ConfigError(reader.problems)
    return tables


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config ({error.strerror}); give the path of a TOML file") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: values are nested too deeply; take brackets out") from None
    except ValueError as error:  # bytes that are not UTF-8 and numbers of thousands of digits, too
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def section_from_dict[T](section: type[T], values: Mapping[str, Any], source: str) -> T:
    """One section, e.g. ``ModelConfig``, or a whole ``NaViLConfig``, as ``config_to_dict`` gave it.

    Raises:
        ConfigError: a key or value is wrong.
    """
    return _Reader(section, source).read(values)


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config, or one section of it, as values that JSON can hold; tuples become lists."""
    return {field.name: _to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def differing_settings(name: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of every setting that differs; a section that ``one`` lacks is an empty one."""
    if isinstance(other, dict):
        one = one if isinstance(one, dict) else {}
        for key in sorted(one.keys() | other.keys()):
            yield from differing_settings(f"{name}.{key}", one.get(key), other.get(key))
    elif one != other:
        yield name, one, other


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return value


class _Reader[T]:
    """Turns plain tables into the dataclass ``root`` and collects every problem on the way."""

    def __init__(self, root: type[T], source: str) -> None:
        self.root = root
        self.source = source
        self.problems: list[str] = []
        self.origins: dict[str, str] = {}
        """Dotted key -> the override or file that set it last, so that a problem is blamed on the right place."""

    def read(self, values: Mapping[str, Any]) -> T:
        """The dataclass, or one ConfigError with every problem."""
        config = self._section(self.root, values, "")
        if self.problems:
            raise ConfigError(self.problems)
        return config

    def tables(self, path: Path | None, overrides: Iterable[str]) -> dict[str, Any]:
        """What a file and its overrides say."""
        tables: dict[str, Any] = {}
        if path is not None:
            self._lay_file(tables, path, ())
        for override in overrides:
            if override.endswith(".toml") and "=" not in override:
                self._lay_file(tables, Path(override), ())
            else:
                self._override(tables, override)
        return tables

    def _lay_file(self, tables: dict[str, Any], path: Path, extended_by: tuple[Path, ...]) -> None:
        """Lays a config file over ``tables``, after those that it extends."""
        if path.resolve() in extended_by:
            raise ConfigError(f"{path}: extends itself, by way of {extended_by[-1]}; take one of the two out")
        own = _read_toml(path)
        named = own.pop(EXTENDS, [])
        bases = [named] if isinstance(named, str) else named
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            expected = 'the path of a config, or several: extends = "base.toml"'
            raise ConfigError(f"{path}: extends: found {_found(named)}, expected {expected}")
        for base in bases:
            self._lay_file(tables, path.parent / base, (*extended_by, path.resolve()))
        self._lay(tables, under(path.parent, self.root, own), "", str(path))

    def _lay(self, tables: dict[str, Any], values: Mapping[str, Any], key: str, source: str) -> None:
        """Lays the tables of a file over others; what is no table replaces what was there."""
        for name, value in values.items():
            dotted = _join(key, name)
            if isinstance(value, dict):
                inner = tables.get(name)
                tables[name] = inner if isinstance(inner, dict) else {}
                self._lay(tables[name], value, dotted, source)
            else:
                tables[name] = value
                self._note_origin(dotted, source)

    def _note_origin(self, key: str, source: str) -> None:
        self.origins.pop(key, None)  # the last one stands last
        self.origins[key] = source

    def _override(self, tables: dict[str, Any], text: str) -> None:
        """Sets one ``section.field=value`` in ``tables``."""
        key, equals, value = text.partition("=")
        names = [name.strip() for name in key.split(".")]
        if not equals or not all(names):
            self.problems.append(f"override {text!r}: expected section.field=value, e.g. training.train_steps=100")
            return
        table = tables
        for name in names[:-1]:
            inner = table.setdefault(name, {})
            if not isinstance(inner, dict):
                # The path runs through a value: an empty table lets the reader name the key that does not exist.
                inner = table[name] = {}
            table = inner
        table[names[-1]] = _parse_value(value)
        self._note_origin(".".join(names), f"override {text if len(text) <= 200 else f'{text[:197]}...'}")

    def _blame(self, key: str) -> str:
        """Where the value of ``key`` came from."""
        key = key.partition("[")[0]
        near = (
            source
            for origin, source in reversed(self.origins.items())
            if origin == key or origin.startswith(key + ".") or key.startswith(origin + ".")
        )
        return next(near, self.source)

    def _note(self, key: str, message: str) -> Any:
        self.problems.append(f"{self._blame(key)}: {message}")
        return _INVALID

    def _section(self, section: type[Any], values: Any, key: str) -> Any:
        """One dataclass; ``key`` is its dotted name, empty for the root."""
        if not isinstance(values, Mapping):
            return self._note(key, f"{key}: expected a table [{key}], found {_found(values)}")
        fields = {field.name: field for field in dataclasses.fields(section)}
        hints = get_type_hints(section)
        arguments = {}
        for name, value in values.items():
            dotted = _join(key, name)
            if name in fields:
                arguments[name] = self._value(hints[name], value, dotted)
            else:
                self._note(dotted, f"{dotted} is not a setting; {self._nearest(section, name, key)}")
        for name, field in fields.items():
            if name not in values and _is_required(field):
                what = _required_names(hints[name])
                dotted = _join(key, name)
                missing = f"section [{dotted}] is missing; it needs {what}" if what else f"{dotted} is missing; set it"
                self._note(dotted, missing)
                arguments[name] = _INVALID
        return _INVALID if any(value is _INVALID for value in arguments.values()) else section(**arguments)

    def _value(self, annotation: Any, value: Any, key: str) -> Any:
        """``value`` as the annotation wants it, or ``_INVALID``."""
        origin = get_origin(annotation)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            return self._section(annotation, value, key)
        if origin in (Union, UnionType):
            (inner,) = (choice for choice in get_args(annotation) if choice is not NoneType)
            return None if value is None or value == "none" else self._value(inner, value, key)
        if origin is Literal:
            choices = get_args(annotation)
            if type(value) in {type(choice) for choice in choices} and value in choices:
                return value
            return self._note(key, f"{key}: found {_found(value)}, expected one of {', '.join(map(repr, choices))}")
        if origin is tuple:
            return self._array(get_args(annotation)[0], value, key)
        if annotation is float and type(value) is int and abs(value) <= sys.float_info.max:
            return float(value)
        if type(value) is int and annotation is int and not -_MAX_INT - 1 <= value <= _MAX_INT:
            return self._note(key, f"{key}: found a number of too many digits, expected at most {_MAX_INT}")
        if type(value) is annotation:
            return value
        hint = f"; quote it: '{key}=\"...\"'" if annotation is str and self._blame(key).startswith("override ") else ""
        return self._note(key, f"{key}: found {_found(value)}, expected {_NOUNS[annotation]}{hint}")

    def _array(self, annotation: Any, value: Any, key: str) -> Any:
        if not isinstance(value, list | tuple) and dataclasses.is_dataclass(annotation):
            return self._note(key, f"{key}: found {_found(value)}, expected an array of tables [[{key}]]")
        if not isinstance(value, list | tuple):
            choices = get_args(annotation) or ("a", "b")
            example = "[1, 2]" if annotation in (int, float) else str(list(choices)).replace("'", '"')
            expected = f"an array of {_PLURALS.get(annotation, 'strings')}, e.g. {example}"
            return self._note(key, f"{key}: found {_found(value)}, expected {expected}")
        items = tuple(self._value(annotation, item, f"{key}[{index}]") for index, item in enumerate(value))
        return _INVALID if any(item is _INVALID for item in items) else items

    def _nearest(self, section: type[Any], name: str, key: str) -> str:
        """What the user may have meant: a near name in the section, the same name elsewhere, or the whole section."""
        names = [field.name for field in dataclasses.fields(section)]
        elsewhere = [dotted for dotted in setting_names(self.root) if dotted.rpartition(".")[2] == name]
        near = difflib.get_close_matches(name, names, n=1)
        if _join(key, name) in RENAMED:
            return f"it is {RENAMED[_join(key, name)]} now"
        if near:
            return f"the nearest is {_join(key, near[0])}"
        if elsewhere:
            return f"it belongs in {elsewhere[0]}"
        return f"{f'[{key}]' if key else 'a config'} has {', '.join(names)}"


def _parse_value(text: str) -> Any:
    """An override's value: TOML, or else the text itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text.strip()
    # A line break in the text could smuggle in a second key.
    return parsed["value"] if len(parsed) == 1 else text.strip()


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _required_names(annotation: Any) -> str:
    """The required fields of a section, for the message that the section is missing; empty for a plain field."""
    if not dataclasses.is_dataclass(annotation):
        return ""
    return ", ".join(field.name for field in dataclasses.fields(annotation) if _is_required(field))


def setting_names(section: type[Any], key: str = "") -> Iterator[str]:
    """Every setting below a section, sections included."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        dotted = _join(key, field.name)
        yield dotted
        if dataclasses.is_dataclass(hints[field.name]):
            yield from setting_names(hints[field.name], dotted)


def _found(value: Any) -> str:
    """A value in an error message, cut to a readable length."""
    if isinstance(value, Mapping):
        return "a table"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return "a value nested too deeply"
    except ValueError:
        return "a number of too many digits"
    return text if len(text) <= 60 else text[:57] + "..."
