"""Arguments of configs, as in `--config=configs/x.py:en_ratio=0.8,languages=all`."""

import difflib
from typing import Any


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """Reads `key=value` pairs with typed defaults; a key without a value means True.

    >>> parse_arg("en_ratio=0.8,small", en_ratio=0.4, small=False, scale="sample")
    {'en_ratio': 0.8, 'small': True, 'scale': 'sample'}

    Raises:
      ValueError: a key is unknown (the message names the nearest one) or stands twice, or a value has the wrong type.
    """
    values, seen = dict(defaults), set()
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config argument {key!r} is not one of {sorted(defaults)}{hint}")
        if key in seen:
            raise ValueError(f"config argument {key}= stands twice; give it once")
        seen.add(key)
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
            f"config argument {key}={text!r}: expected a value of type {kind}, like {default!r}"
        ) from None


def under(root: str, folder: str) -> str:
    """A relative folder in `root`, such as `gs://BUCKET`; without a root the folder itself.

    >>> under("gs://bucket", "data/pangeains")
    'gs://bucket/data/pangeains'
    """
    is_whole = folder.startswith("/") or "://" in folder
    return folder if is_whole or not root else f"{root.rstrip('/')}/{folder}"


def choice(key: str, value: str, options: tuple[str, ...]) -> str:
    """Returns `value`.

    Raises:
      ValueError: it is not one of `options`.
    """
    if value not in options:
        raise ValueError(f"config argument {key}={value!r} is not one of {options}")
    return value


def language_codes(text: str, **named: tuple[str, ...]) -> tuple[str, ...]:
    """The languages of the argument `languages=`: a name in `named`, or codes joined by `+`."""
    return named.get(text) or tuple(text.split("+"))
