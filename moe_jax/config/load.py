"""Reads a YAML experiment and `--set` overrides into the frozen tree of `schema.py`, and writes it
back.

There are three layers: the `base:` file (one level), the file and the overrides. Each is checked by
itself, so that an error can name its place, and its paths are made absolute: those of a file are
relative to its folder, those of an override to the working directory. Then the layers are merged
and built, and the sections check their combinations. Every failure is one sentence in a
`UserError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import yaml

from moe_jax.config.fields import PathTo, bounds_text
from moe_jax.config.schema import Config
from moe_jax.errors import UserError
from moe_jax.utils.files import is_hub_name, local_path

# What a file should be, for those who name another.
_CONFIGURATION = "a YAML configuration, such as configs/tiny.yaml"

# YAML 1.2's scalars instead of PyYAML's YAML 1.1, in which `3e-4` is text, `no` is a boolean and
# `1:30` is ninety. (ruamel.yaml has them, and would be one more dependency.)
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)

# What YAML has to read where a text is wanted: one in quotes, and null.
_YAML_TEXT = re.compile(r"""null|Null|NULL|~|"(?:\\.|[^"\\])*"|'(?:''|[^'])*'""", re.DOTALL)


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars above, and no key twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `_Loader` would read as another type."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Unusual line breaks survive only as escapes in double quotes."""
        return self.represent_scalar(
            "tag:yaml.org,2002:str",
            text,
            style='"' if re.search("[\r\x85\u2028\u2029\ufeff]", text) else None,
        )


_Dumper.add_representer(str, _Dumper.represent_text)

for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}  # else the scalars below would join YAML 1.1's
    for _name, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, its `base:` below it and `a.b=value` overrides on top.

    Raises:
        UserError: a file that cannot be read, an unknown key, a value of the wrong type, an
          impossible combination.
    """
    path = local_path(path)
    values = _parse(_read(path, _CONFIGURATION), str(path))
    base = values.pop("base", None)
    layers = [_layer(values, str(path), path.parent)]
    if base is not None:
        layers.insert(0, _base_layer(path, base))
    layers += [_layer(_override(text), "--set", Path()) for text in overrides]
    return _build(Config, _absolute(functools.reduce(_merge, layers)))


def with_absolute_paths(config: Config) -> Config:
    """The configuration with its relative paths taken from the working directory."""
    values = dataclasses.asdict(config)
    return _build(Config, _absolute(_located(Config, values, "the configuration", Path())))


def config_from_text(text: str, source: str = "the configuration") -> Config:
    """The configuration in a YAML text without a `base:`, as `dump_config` writes it; `source`
    names it in errors.
    """
    return _build(Config, _checked(Config, _parse(text, source), source))


def section_from_dict(
    section: Any, values: Mapping[str, Any], prefix: str = "", source: str = "the configuration"
) -> Any:
    """One section, such as `ModelConfig`, from its keys and values; `prefix` is where it stands in
    the tree.
    """
    return _build(section, _checked(section, values, source, prefix))


def read_yaml(path: Path, what: str) -> dict[Any, Any]:
    """The keys and values of a YAML file, {} if it is empty. Raises UserError if it cannot be read
    or holds something else; `what` says what it should be.
    """
    return _parse(_read(path, what), str(path))


def dump_config(config: Config) -> str:
    """The whole tree as YAML, defaults included, which `config_from_text` reads back to an equal
    one.
    """
    return yaml.dump(
        _plain(dataclasses.asdict(config)),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=math.inf,
    )


def dump_value(value: Any) -> str:
    """One value as it is written in YAML on one line: `null`, `1.0e-06`, `[0, 2]`."""
    return yaml.dump(
        _plain(value), Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf
    ).split("\n")[0]


def field_types(section: Any) -> dict[str, Any]:
    """The resolved type of each of a section's fields, in order."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def type_text(hint: Any) -> str:
    """What a value of this type is called in an error message and in the documentation."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if (inner := _section_of_list(hint)) is not None:
        keys = ", ".join(f"{name}: {type_text(kind)}" for name, kind in field_types(inner).items())
        return f"a list, each {{{keys}}}"
    if typing.get_origin(hint) is tuple:
        return f"a list, each {type_text(arguments[0])}"
    if isinstance(hint, types.UnionType):
        return " or ".join(type_text(argument) for argument in arguments)
    return {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
    }[hint]


def all_keys(section: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key below a section, sections included, in order."""
    keys = []
    for name, hint in field_types(section).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += all_keys(hint, f"{prefix}{name}.")
    return keys


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; give the path of {what}.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a directory; give the path of {what}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); give {what}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; make it readable.") from error


def _parse(text: str, source: str) -> dict[Any, Any]:
    values = _yaml(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"{source} holds {_shown(values)}; it must be a mapping of keys such as `train:` to "
            f"values."
        )
    return values


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(
            f"{source}{line}: broken YAML: {error.problem or error.context}; correct it."
        ) from error
    except yaml.reader.ReaderError as error:
        raise UserError(
            f"{source}: broken YAML: a character that YAML forbids at position {error.position}; "
            f"remove it."
        ) from error
    except RecursionError as error:
        raise UserError(
            f"{source}: broken YAML: brackets nested too deep; a configuration has three levels."
        ) from error
    except ValueError as error:
        raise UserError(f"{source}: broken YAML: {error}; correct it.") from error


def _base_layer(path: Path, base: Any) -> dict[str, Any]:
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{path}: base={base!r} must be text: the path of another configuration, relative to "
            f"this one."
        )
    base_path = path.parent / local_path(base)
    try:
        text = _read(base_path, _CONFIGURATION)
    except UserError as error:
        raise UserError(f"{path}: base={base!r}: {error}") from error
    if os.path.samefile(path, base_path):
        raise UserError(f"{path}: base={base!r} is this file itself: name another, or remove it.")
    values = _parse(text, str(base_path))
    if "base" in values:
        raise UserError(
            f"{path}: base={base!r} has a base itself, and one level is all there is; name "
            f"{values['base']!r} or copy its keys."
        )
    return _layer(values, str(base_path), base_path.parent)


def _layer(values: Mapping[Any, Any], source: str, folder: Path) -> dict[str, Any]:
    """One layer, checked; its relative paths begin in `folder`."""
    return _located(Config, _checked(Config, values, source), source, folder)


class _Located(NamedTuple):
    """A path and where it was given; a layer above may still replace it."""

    value: str
    kind: PathTo
    given: str
    """For messages."""
    folder: Path
    """Where it begins if it is relative."""

    def absolute(self) -> str:
        """The whole path, or the word that stands in its place."""
        if re.fullmatch(self.kind.words, self.value):
            return self.value
        try:
            here = local_path(self.value)
        except UserError as error:
            raise UserError(f"{self.given}: {error}") from error
        path = os.path.abspath(self.folder / here)
        if os.path.exists(path):
            return path
        if os.path.exists(here):  # relative to the working directory, as it once was
            raise UserError(
                f"{self.given} is relative to the file's own folder, where there is no {path}: "
                f"write {os.path.relpath(here, self.folder)}."
            )
        return self.value if self.kind.hub and is_hub_name(here) else path


def _located(
    section: Any, values: Mapping[str, Any], source: str, folder: Path, prefix: str = ""
) -> dict[str, Any]:
    """The values of a section with every path in it as `_Located`."""
    hints = field_types(section)
    placed = dict(values)
    for name, value in values.items():
        key, kind = f"{prefix}{name}", section.__dataclass_fields__[name].metadata["path"]
        inner = _section_of_list(hints[name])
        if isinstance(value, Mapping):
            placed[name] = _located(hints[name], value, source, folder, f"{key}.")
        elif inner is not None:
            placed[name] = tuple(
                _located(inner, each, source, folder, f"{key}[{number}].")
                for number, each in enumerate(value)
            )
        elif value and kind is not None:
            placed[name] = _Located(value, kind, f"{source}: {key}={value!r}", folder)
    return placed


def _absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all layers together, with absolute paths."""

    def absolute(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _absolute(value)
        if isinstance(value, tuple) and any(isinstance(each, Mapping) for each in value):
            return tuple(_absolute(each) for each in value)
        return value.absolute() if isinstance(value, _Located) else value

    return {name: absolute(value) for name, value in values.items()}


def _override(text: str) -> dict[str, Any]:
    """`a.b=value` as {a: {b: value}}."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(
            f"--set {text!r} is not of the form key=value, such as --set train.steps=100."
        )
    key, value = key.strip(), value.strip()
    values: Any = value if _is_plain_text(key, value) else _yaml(value, f"--set {key}")
    for part in reversed(key.split(".")):
        values = {part: values}
    return values


def _is_plain_text(key: str, value: str) -> bool:
    """Whether an override is taken as it was typed, without YAML's comments (`texts #2`), mappings
    (`a: b`) and lists (`[INST]`): a text that is neither in quotes nor null. An empty path is null.
    """
    section: Any = Config
    *sections, name = key.split(".")
    for part in sections:
        section = field_types(section).get(part) if dataclasses.is_dataclass(section) else None
    if not dataclasses.is_dataclass(section) or name not in field_types(section):
        return False
    hint, metadata = field_types(section)[name], section.__dataclass_fields__[name].metadata
    if str not in (hint, *typing.get_args(hint)):
        return False
    return metadata["path"] is None if not value else not re.fullmatch(_YAML_TEXT, value)


def _checked(
    section: Any, values: Mapping[Any, Any], source: str, prefix: str = ""
) -> dict[str, Any]:
    """The values given for a section, converted to the types of its fields; refuses what does not
    belong there.
    """
    hints = field_types(section)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise UserError(f"{source}: there is no key {key!r}; {_nearest(str(name), prefix)}")
        hint = hints[name]
        if (inner := _section_of_list(hint)) is not None:
            checked[name] = _checked_list(inner, value, source, key)
        elif not dataclasses.is_dataclass(hint):
            field = section.__dataclass_fields__[name]
            checked[name] = _leaf(hint, value, source, key, bounds_text(field.metadata))
        elif isinstance(value, Mapping):
            checked[name] = _checked(hint, value, source, f"{key}.")
        else:
            raise UserError(
                f"{source}: {key}={_shown(value)} must be a mapping of keys such as "
                f"{key}.{next(iter(field_types(hint)))}."
            )
    return checked


def _section_of_list(hint: Any) -> Any:
    """The section of a list of sections (`tuple[Section, ...]`), else None."""
    inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return inner if dataclasses.is_dataclass(inner) else None


def _checked_list(section: Any, value: Any, source: str, key: str) -> tuple[dict[str, Any], ...]:
    """The sections of a list, each built once so that its bounds are checked where it stands."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, Mapping) for x in value):
        keys = ", ".join(f"{name}: ..." for name in field_types(section))
        raise UserError(f"{source}: {key}={_shown(value)} must be a list of {{{keys}}}.")
    checked = []
    for number, each in enumerate(value):
        place = f"{key}[{number}]."
        checked.append(_checked(section, each, source, place))
        try:
            _build(section, checked[-1])
        except UserError as error:
            raise UserError(str(error).replace(section.SECTION, place)) from error
    return tuple(checked)


@functools.cache
def _validator(hint: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))


def _leaf(hint: Any, value: Any, source: str, key: str, bounds: str) -> Any:
    try:
        # Strict, except that YAML has lists where the tree has tuples.
        return _validator(hint).validate_python(tuple(value) if isinstance(value, list) else value)
    except pydantic.ValidationError as error:
        allowed = type_text(hint) + (f", {bounds}" if bounds else "")
        quote = "; put it in quotes" if hint is str and not isinstance(value, (list, dict)) else ""
        raise UserError(f"{source}: {key}={_shown(value)} must be {allowed}{quote}.") from error


def _shown(value: Any) -> str:
    """A value as a person would write it in YAML, cut to fit a sentence."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(name: str, prefix: str) -> str:
    """A sentence with the keys that may be meant: of the same name elsewhere or a similar name
    here, else of a similar name elsewhere.
    """
    keys = all_keys()
    if prefix + name in keys:
        section, _, rest = name.rpartition(".")
        return f"write it as `{rest}:` under `{section}:`."
    here = [key for key in keys if key.startswith(prefix) and "." not in key[len(prefix) :]]
    last = {key: key.rpartition(".")[2] for key in keys}
    meant = [key for key in keys if last[key] == name]
    meant += [
        prefix + match
        for match in difflib.get_close_matches(name, [last[key] for key in here], n=3, cutoff=0.6)
    ]
    if not meant:
        similar = difflib.get_close_matches(name, sorted(set(last.values())), n=3, cutoff=0.7)
        meant = [key for match in similar for key in keys if last[key] == match]
    if meant:
        return "did you mean " + " or ".join(list(dict.fromkeys(meant))[:3]) + "?"
    return (
        f"the keys {'of ' + prefix[:-1] + ' ' if prefix else ''}are "
        + ", ".join(last[key] for key in here)
        + "."
    )


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(merged.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


def _build(section: Any, values: Mapping[str, Any]) -> Any:
    """The section's dataclass from checked values; its own checks run here."""
    hints = field_types(section)
    return section(
        **{
            name: tuple(_build(inner, each) for each in value)
            if (inner := _section_of_list(hints[name])) is not None
            else _build(hints[name], value)
            if isinstance(value, Mapping)
            else value
            for name, value in values.items()
        }
    )


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
