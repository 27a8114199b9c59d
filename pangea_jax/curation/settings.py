"""Sections of a config as the dataclasses that they fill."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from pangea_jax.curation.workflow import JobError, plain

Settings = TypeVar("Settings")


def section(config: Mapping[str, Any], name: str, kind: type[Settings], **fixed: Any) -> Settings:
    """`config[name]` as a `kind`; `fixed` are fields that the section may not set.

    Raises:
      JobError: the section has a key that is not a field of `kind`.
    """
    values = plain(config[name])
    fields = {field.name for field in dataclasses.fields(kind)} - fixed.keys()
    unknown = values.keys() - fields
    if unknown:
        raise JobError(
            f"config.{name}: unknown {', '.join(sorted(unknown))}; it may have {', '.join(sorted(fields))}"
        )
    return kind(**values, **fixed)
