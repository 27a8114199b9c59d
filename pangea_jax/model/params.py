"""A module's parameters as one flat dict, `{"language.blocks.q_kernel_dhc": array, ...}`, and back.

Sharding, freezing, learning rates and checkpoints match patterns on these names.
"""

import re
from collections.abc import Iterable, Mapping

import jax
from flax import nnx
from jaxtyping import Array


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Array]]:
    """The module's structure, and its parameters by dotted name."""
    graphdef, state = nnx.split(module)
    return graphdef, flatten(state)


def merge(graphdef: nnx.GraphDef, params: Mapping[str, Array]) -> nnx.Module:
    """The inverse of `split`. Parameters may also be tracers, shapes or shardings."""
    return nnx.merge(graphdef, unflatten(params))


def flatten(state: nnx.State) -> dict[str, Array]:
    """An NNX state (of arrays, shapes or shardings) by dotted name."""
    return {
        ".".join(map(str, path)): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(state)
    }


def unflatten(params: Mapping[str, Array]) -> nnx.State:
    """The inverse of `flatten`."""
    return nnx.from_flat_state(
        [(tuple(name.split(".")), nnx.Param(value)) for name, value in params.items()]
    )


def abstract(make_module) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """Structure and parameter shapes of `make_module()` without computing anything."""
    return split(nnx.eval_shape(make_module))


def select(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that fully match one of the regular expressions.

    Raises:
      ValueError: a pattern matches no name, so it is a typing error.
    """
    names, chosen = list(names), set()
    for pattern in patterns:
        matched = {name for name in names if re.fullmatch(pattern, name)}
        if not matched:
            roots = sorted({name.split(".")[0] for name in names})
            raise ValueError(f"pattern {pattern!r} matches no parameter; they begin with {roots}")
        chosen |= matched
    return chosen
