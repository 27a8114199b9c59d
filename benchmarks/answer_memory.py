"""The memory that reading and answering need on one chip, from the compiled programs, without the chip.

    python -m benchmarks.answer_memory --topology=v6e:1x1 --rows=16 [--tokens=4096] [--tiles=5] [--new_tokens=512]

Pangea-7B with random shapes in the dtype of its config. Compiles what `Engine.serve` runs: to read one prompt, to move
it into the batch, and a few steps of all rows. Prints the GiB of each program beside what `pangea_jax.generate.fit`
counts. It needs requirements-tpu-aot.txt; `--topology=cpu:1` needs nothing.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launch import compile as aot
from pangea_jax import experiment, sharding
from pangea_jax.batch import Batch
from pangea_jax.generate import batching, fit, programs
from pangea_jax.generate.decode import Sampling
from pangea_jax.model import Pangea, PangeaConfig
from pangea_jax.model import params as model_params


class Programs:
    """The programs of one model on one device, compiled from shapes."""

    def __init__(self, config: PangeaConfig, topology: str):
        mesh, self.memory = aot.topology_mesh(topology, 1, experiment.MeshConfig(-1, 1, 1))
        self._mesh = sharding.make_mesh(1, 1, 1, devices=mesh.devices.flatten()[:1])
        make = lambda: Pangea(config, rngs=nnx.Rngs(0), dtype=config.dtype)  # noqa: E731
        self._graphdef, shapes = model_params.abstract(make)
        self._params = self.placed(shapes)

    def placed(self, shapes):
        """The same shapes on the device."""
        whole = NamedSharding(self._mesh, P())
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)  # noqa: E731
        return jax.tree.map(place, shapes)

    def _call(self, function):
        def call(params, *args, **named):
            with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
                return function(model_params.merge(self._graphdef, params), *args, **named)

        return call

    def shape(self, function, *args, **named):
        """The shapes of a function's result."""
        call = lambda *arrays: self._call(function)(*arrays, **named)  # noqa: E731
        return self.placed(jax.eval_shape(call, self._params, *args))

    def peak(self, function, *args, donated: int | None = None, **named) -> float:
        """GiB of a compiled function at its peak, weights included."""
        options = {} if donated is None else {"donate_argnums": donated}
        jitted = jax.jit(self._call(function), static_argnames=tuple(named), **options)
        memory = jitted.lower(self._params, *args, **named).compile().memory_analysis()
        return memory.peak_memory_in_bytes / fit.GIB


def measure(config: PangeaConfig, topology: str, rows: int, tokens: int, tiles: int, new: int):
    """Prints the memory of the programs, see the module."""
    compiled = Programs(config, topology)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    side = config.vision.image_size
    pixels = jax.ShapeDtypeStruct((1, tiles, side, side, 3), jnp.uint8)
    names = ("tokens", "image_index", "positions", "segment_ids")
    prompt = Batch(**dict.fromkeys(names, array(1, tokens)), tiles=pixels)
    sampling = lambda n: jax.tree.map(np.asarray, Sampling.make(n))  # noqa: E731
    ends = np.zeros(2, np.int32), np.int32(new)
    read = compiled.placed((prompt, *map(_shapes, (sampling(1), *ends))))
    answer = compiled.placed(tuple(map(_shapes, (sampling(rows), *ends, np.ones(rows, bool)))))
    batch = compiled.shape(lambda model: programs._idle(model, rows, tokens, new, 0))
    sizes = {"room": 0, "max_new_tokens": new}
    begun = compiled.shape(programs._begin, *read, **sizes)
    row = compiled.placed(array(1))
    print(f"{topology}, {compiled.memory:.2f} GiB; {rows} rows of {tokens:,} + {new} tokens")
    print(f"weights         {fit.weight_bytes(config, None) / fit.GIB:6.2f} GiB")
    print(f"caches          {rows * fit.cache_bytes(config, tokens + new) / fit.GIB:6.2f}")
    print(
        f"counted to read {fit.row_bytes(config, tokens, tiles, 1, 0) / fit.GIB:6.2f}, beside weights"
    )
    print(f"read a prompt   {compiled.peak(programs._begin, *read, **sizes):6.2f}", flush=True)
    print(f"into the batch  {compiled.peak(programs._insert, batch, begun, row, donated=1):6.2f}")
    steps = {"steps": batching.STEPS, "donated": 1}
    print(f"decode a few    {compiled.peak(programs._advance, batch, *answer, **steps):6.2f}")


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), tree)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v6e:1x1")
    for name, value in (("rows", 16), ("tokens", 4096), ("tiles", 5), ("new_tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    measure(PangeaConfig(), args.topology, args.rows, args.tokens, args.tiles, args.new_tokens)


if __name__ == "__main__":
    main()
