"""Configuration: a TOML file read into typed dataclasses, with `--section.key=value` overrides.

The dataclass is the schema. Its field names are the keys, its annotations the types, its defaults the
defaults, its `__post_init__` the checks between keys. Anything else is a `ConfigError` that names the file,
the key and the nearest right name, so that a typo never silently trains the wrong model.

    [train]                         @dataclass
    batch_size = 64                 class Config:
                                        train: TrainConfig
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from pathlib import Path


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the remedy."""


def load(path, schema, overrides=()):
    """Read the TOML file `path` into the dataclass `schema`; `overrides` are strings `section.key=value`.

    A file may begin with `extends = "other.toml"`, a path from its own folder: it is then read over the keys of that.
    A value on the command line is read as TOML (`8`, `0.1`, `true`, `[1, 2]`), and as plain text where it is not.
    Raises `ConfigError`.
    """
    path = Path(path)
    raw = _read(path)
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError(f"override '{override}' has no value; write --{key}=VALUE")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *sections, name = key.split(".")
        table = raw
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"override '--{key}': '{section}' is a value, not a section")
        table[name] = value
    return from_dict(raw, schema, str(path))


def _read(path, seen=()):
    """The keys of a TOML file and of those that it extends. Raises `ConfigError`."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = sorted(str(p) for p in Path("configs").rglob("*.toml"))
        near = difflib.get_close_matches(str(path), found, 1, 0.4)
        raise ConfigError(f"{path}: no such config file{_hint(near)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if (other := raw.pop("extends", None)) is None:
        return raw
    if not isinstance(other, str) or path.resolve() in seen:
        raise ConfigError(f"{path}: 'extends' must be the path of another file, which does not extend this one")
    return _over(_read(path.parent / other, (*seen, path.resolve())), raw)


def _over(base, raw):
    """The keys of `raw` over those of `base`, section by section."""
    sections = [key for key in raw if isinstance(base.get(key), dict) and isinstance(raw[key], dict)]
    return base | raw | {key: _over(base[key], raw[key]) for key in sections}


def from_dict(raw, schema, where, prefix=""):
    """Build the dataclass `schema` from the plain dict `raw`; `where` names its origin in error messages."""
    hints = typing.get_type_hints(schema)
    for key in raw:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            raise ConfigError(f"{where}: unknown key '{prefix}{key}'{_hint(near)}; known keys: {', '.join(hints)}")
    values = {key: _convert(value, hints[key], where, prefix + key) for key, value in raw.items()}
    for field in dataclasses.fields(schema):
        if field.name in values:
            continue
        if dataclasses.is_dataclass(hints[field.name]):  # an absent section: its defaults
            values[field.name] = from_dict({}, hints[field.name], where, f"{prefix}{field.name}.")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the key '{prefix}{field.name}' is missing")
    try:
        return schema(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {f'[{prefix[:-1]}] ' if prefix else ''}{error}") from None


def to_json(config):
    """The configuration as indented JSON, as it is stored beside a checkpoint."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def differences(old, new, prefix=""):
    """The keys whose values differ between two plain dicts, as strings `section.key: old -> new`."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} -> {b!r}"


def _hint(near):
    return f" (did you mean '{near[0]}'?)" if near else ""


def _convert(value, kind, where, key):
    """Check `value` against the annotation `kind` and convert where nothing is lost (3 -> 3.0, 2e7 -> 20000000)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    wrong = ConfigError(f"{where}: '{key}' must be {_name(kind)}, not {value!r}")
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise wrong
        return from_dict(value, kind, where, f"{key}.")
    if origin is typing.Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), map(str, arguments), 1)
            raise ConfigError(f"{where}: '{key}' must be {_name(kind)}, not {value!r}{_hint(near)}")
        return value
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _convert(value, option, where, key)
            except ConfigError:
                pass
        raise wrong
    if origin is list:
        if not isinstance(value, list):
            raise wrong
        return [_convert(item, arguments[0], where, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(arguments):
            raise wrong
        return tuple(_convert(item, a, where, f"{key}[{i}]") for i, (item, a) in enumerate(zip(value, arguments)))
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {name: _convert(item, arguments[1], where, f"{key}.{name}") for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        raise wrong
    return value


def _name(kind):
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if dataclasses.is_dataclass(kind):
        return "a section"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, str(getattr(kind, "__name__", kind) if typing.get_origin(kind) is None else kind))
