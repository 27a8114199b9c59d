"""A model in training answers: its parameters are copied within the devices, once per process.

The training mesh may spread a parameter over all hosts, which would then send it at every decoding step. So each
process gets a whole model on its own devices, in the dtype of the activations, as `load` would give it. The processes
then answer different conversations and need not wait for one another.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from pangea_jax import sharding
from pangea_jax.data.reader import ReadingPolicy
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.generate.engine import Engine, choose_mesh
from pangea_jax.model import Pangea, PangeaConfig
from pangea_jax.model import params as model_params


class Replica:
    """This process's copy of a model in training."""

    def __init__(self, config: PangeaConfig, tokenizer: Tokenizer, policy: ReadingPolicy):
        self._config, self._tokenizer, self._policy = config, tokenizer, policy
        self._graphdef, shapes = model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0)))
        here = choose_mesh("auto", config)
        tensor = 1 if here is None else here.shape["tensor"]
        everywhere = sharding.make_mesh(data=-1, fsdp=1, tensor=tensor)
        self._targets = sharding.param_shardings(shapes, everywhere)
        self._mesh = None if here is None else _own_part(everywhere)
        self._engine: Engine | None = None

    def engine(self, params: Mapping[str, Array]) -> Engine:
        """The engine with these parameters, on any mesh of all devices. All processes must call it."""
        dtype = jnp.dtype(self._config.dtype)
        cast = jax.jit(
            lambda tree: {
                name: value if sharding.quantized_part(name)[1] else value.astype(dtype)
                for name, value in tree.items()
            },
            out_shardings=self._targets,
        )
        own = {name: self._own(value) for name, value in cast(dict(params)).items()}
        model = model_params.merge(self._graphdef, own)
        if self._mesh is None and jax.default_backend() == "cpu":
            model.language.unstack()
        if self._engine is None:
            settings = {"policy": self._policy, "mesh": self._mesh}
            self._engine = Engine(model, self._tokenizer, **settings)
        else:
            self._engine.replace(model)
        return self._engine

    def release(self) -> None:
        """Frees the copy."""
        if self._engine is not None:
            self._engine.replace(None)

    def _own(self, value: Array) -> Array:
        shards = [shard.data for shard in value.addressable_shards]
        if self._mesh is None:
            return shards[0]
        place = NamedSharding(self._mesh, value.sharding.spec)
        return jax.make_array_from_single_device_arrays(value.shape, place, shards)


def _own_part(mesh: Mesh) -> Mesh:
    """The part of the mesh on this process's devices; an axis "tensor" never leaves a process."""
    rows = mesh.devices.reshape(-1, 1, mesh.shape["tensor"])
    own = [row for row in rows if row[0, 0].process_index == jax.process_index()]
    return Mesh(np.stack(own), mesh.axis_names, axis_types=mesh.axis_types)
