"""The train state: a pytree that is created with its shardings."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Int

from pangea_jax.model import Pangea, PangeaConfig
from pangea_jax.model import params as model_params
from pangea_jax.sharding import param_shardings, quantized_part, state_shardings


@struct.dataclass
class TrainState:
    """Parameters, optimiser and step. Frozen parameters have no optimiser state."""

    step: Int[Array, ""]
    trainable: dict[str, Array]
    frozen: dict[str, Array]
    opt_state: optax.OptState

    @property
    def params(self) -> dict[str, Array]:
        return self.trainable | self.frozen


def init_state(
    config: PangeaConfig,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    frozen: Sequence[str] = (),
    pretrained: dict[str, Array] | None = None,
) -> tuple[nnx.GraphDef, TrainState, TrainState]:
    """Structure, state, and the state's shardings.

    One jitted function makes the arrays in their shardings, so no device ever holds more than its part.

    Args:
      frozen: patterns of the names of parameters that do not train. They are kept in `config.dtype`.
      pretrained: some parameters by name; they replace the random ones.

    Raises:
      ValueError: a pattern, or the name or shape of a pretrained parameter, fits no parameter.
    """
    pretrained = pretrained or {}
    graphdef, create, shapes, shardings = _plan(config, optimizer, mesh, seed, frozen)
    _check_pretrained(pretrained, shapes.params)
    state = jax.jit(create, out_shardings=shardings)(pretrained)
    return graphdef, state, shardings


def abstract_state(
    config: PangeaConfig,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    frozen: Sequence[str] = (),
) -> tuple[nnx.GraphDef, TrainState, TrainState]:
    """`init_state` with shapes instead of arrays. It computes nothing, and the devices of `mesh` need not exist."""
    graphdef, _, shapes, shardings = _plan(config, optimizer, mesh, 0, frozen)
    return graphdef, shapes, shardings


def _plan(config, optimizer, mesh, seed, frozen):
    """Structure, a function from pretrained parameters to the state, and the state's shapes and shardings."""

    def make():
        return Pangea(config, rngs=nnx.Rngs(seed))

    graphdef, shapes = model_params.abstract(make)
    frozen_names = model_params.select(shapes, frozen)
    codes = [name for name in shapes if quantized_part(name)[1] and name not in frozen_names]
    if codes:
        raise ValueError(
            f"{codes[0]} is in {config.language.weights}, which does not train: add adapters "
            "(config.model.language.lora) and freeze the rest (config.frozen), or set config.model.language.weights=''"
        )

    def create(pretrained):
        params = model_params.split(make())[1]
        params |= {name: value.astype(params[name].dtype) for name, value in pretrained.items()}
        trainable = {n: v for n, v in params.items() if n not in frozen_names}
        kept = {
            n: v if quantized_part(n)[1] else v.astype(config.dtype)
            for n, v in params.items()
            if n in frozen_names
        }
        return TrainState(jnp.int32(0), trainable, kept, optimizer.init(trainable))

    placed = param_shardings(shapes, mesh)
    state = jax.eval_shape(create, {})
    return graphdef, create, state, state_shardings(state, placed, mesh)


def _check_pretrained(pretrained, shapes):
    unknown = sorted(set(pretrained) - set(shapes))
    if unknown:
        raise ValueError(f"pretrained parameters that the model does not have: {unknown}")
    for name, value in pretrained.items():
        if value.shape != shapes[name].shape:
            raise ValueError(
                f"pretrained parameter {name} has shape {value.shape}, the model's is {shapes[name].shape}"
            )
