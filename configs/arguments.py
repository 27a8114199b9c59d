"""Arguments of configs, as in `--config=configs/x.py:en_ratio=0.8,languages=all`."""

import difflib
from typing import Any


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """`key=value` pairs over typed defaults; a bare key means True.

    >>> parse_arg("en_ratio=0.8,small", en_ratio=0.4, small=False, scale="sample")
    {'en_ratio': 0.8, 'small': True, 'scale': 'sample'}

    Raises:
      ValueError: an unknown key (the message names the nearest), or a value of the wrong type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config argument {key!r} is not one of {sorted(defaults)}{hint}")
        values[key] = _convert(key, text, defaults[key])
    return values


def _convert(key, text, default):
    try:
        if isinstance(default, bool):
            return {"": True, "true": True, "1": True, "false": False, "0": False}[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        kind = type(default).__name__
        raise ValueError(
            f"config argument {key}={text!r}: expected a {kind}, like {default!r}"
        ) from None


def choice(key: str, value: str, options: tuple[str, ...]) -> str:
    """`value` if it is one of `options`.

    Raises:
      ValueError: it is not.
    """
    if value not in options:
        raise ValueError(f"config argument {key}={value!r} is not one of {options}")
    return value
