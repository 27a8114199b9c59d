"""Configs from dataclasses: a dataclass declares names, types and defaults; files and flags fill them.

`section` makes the `ml_collections.ConfigDict` that a config file fills and flags override. `build`
makes the dataclass from it, and checks names and types against the declaration.
"""

import collections.abc
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, FieldReference, FrozenConfigDict, config_dict

T = TypeVar("T")


class ConfigError(ValueError):
    """A key of a config is unknown or missing, or its value has the wrong type; names the key."""


def section(kind: type, /, **values: Any) -> ConfigDict:
    """A config with all keys and defaults of a dataclass, and of the dataclasses in it.

    A key without a default has no value until it is set.

    Args:
      values: keys to set. For a dataclass in it, the value is a mapping of some of its keys.

    Raises:
      ConfigError: a key is unknown; the message names the nearest known key.
    """
    config, hints = ConfigDict(), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        config[field.name] = _empty(hints[field.name], _default(field))
    for name, value in values.items():
        _known(name, config, kind.__name__)
        part = _without_none(hints[name])[0]
        is_part = dataclasses.is_dataclass(part) and not isinstance(value, ConfigDict)
        config[name] = section(part, **value) if is_part and value is not None else value
    return config


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _empty(hint: Any, default: Any) -> Any:
    """The value of a key before it is set. A FieldReference keeps the type of a key that is None."""
    if dataclasses.is_dataclass(hint):
        given = default if dataclasses.is_dataclass(default) else None
        return section(hint, **({} if given is None else dataclasses.asdict(given)))
    kind, optional = _without_none(hint)
    value = None if default is dataclasses.MISSING else default
    plain = typing.get_origin(kind) or kind
    plain = tuple if plain is collections.abc.Sequence else plain
    if not optional and value is not None:
        return value
    if plain not in (bool, int, float, str, tuple):
        return value
    if not optional:
        return config_dict.required_placeholder(plain)
    return FieldReference(value, field_type=plain)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type without None, and whether None is allowed."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return (kinds[0] if len(kinds) == 1 else hint), len(kinds) < len(typing.get_args(hint))


def build(kind: type[T], config: Mapping[str, Any] | ConfigDict, where: str = "config") -> T:
    """Makes the dataclass from a config.

    Args:
      where: the name of the config in errors.

    Raises:
      ConfigError: a key is unknown or has no value, or a value has the wrong type.
      ValueError: the dataclass refuses a value.
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for name in config:
        _known(name, hints, where)
        try:
            value = config[name]
        except config_dict.RequiredValueError:
            continue
        values[name] = _convert(value, hints[name], f"{where}.{name}")
    for field in dataclasses.fields(kind):
        if field.name not in values and _default(field) is dataclasses.MISSING:
            raise ConfigError(f"{where}.{field.name} is not set; {kind.__name__} needs it")
    return kind(**values)


def check_key(kind: type, key: str) -> None:
    """Checks a key such as `pipeline.rows` against the declaration.

    Raises:
      ConfigError: the key is unknown; the message names the nearest known key.
    """
    where, hint = "config", kind
    for name in key.split("."):
        hint = _without_none(hint)[0]
        if not dataclasses.is_dataclass(hint):
            return  # a key of a mapping, such as mixture.weights.en
        hints = typing.get_type_hints(hint)
        _known(name, hints, where)
        where, hint = f"{where}.{name}", hints[name]


def _known(name: str, names: Iterable[str], where: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(names))}"
        raise ConfigError(f"{where}.{name} is an unknown key{hint}")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Converts `value` to the declared type."""
    kind, optional = _without_none(hint)
    if value is None and optional:
        return None
    if kind is Any:
        return value.to_dict() if isinstance(value, ConfigDict) else value
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping | ConfigDict | FrozenConfigDict):
            return build(kind, value, where)
    elif origin in (tuple, collections.abc.Sequence):
        if isinstance(value, tuple | list):
            repeated = origin is not tuple or arguments[-1] is Ellipsis
            if repeated or len(arguments) == len(value):
                kinds = arguments[:1] * len(value) if repeated else arguments
                return tuple(_convert(v, k, where) for v, k in zip(value, kinds, strict=True))
    elif origin is collections.abc.Mapping:
        if isinstance(value, Mapping | ConfigDict | FrozenConfigDict):
            return {name: _convert(value[name], arguments[1], f"{where}.{name}") for name in value}
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    plain = isinstance(hint, type) and not typing.get_args(hint)
    expected = hint.__name__ if plain else str(hint).replace("collections.abc.", "")
    raise ConfigError(f"{where} is {value!r}; expected {expected}")
