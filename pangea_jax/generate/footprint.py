"""The programs of answering, lowered from shapes: to read a prompt, to move it into the batch, and to decode.

They are those of `programs.Programs` on the same mesh, so what they need once compiled is what an evaluation needs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pangea_jax import sharding
from pangea_jax.batch import Batch
from pangea_jax.generate import batching, fit
from pangea_jax.generate.decode import Sampling
from pangea_jax.generate.programs import Programs, output_shardings
from pangea_jax.model import Pangea, PangeaConfig
from pangea_jax.model import params as model_params


def lower(
    config: PangeaConfig, mesh: Mesh, *, rows: int, tokens: int, tiles: int, new_tokens: int
) -> dict[str, jax.stages.Lowered]:
    """The lowered programs `prefill` (one prompt a shard), `insert` and `decode`. Nothing is initialised.

    Args:
      mesh: the devices; they need not be here.
      rows: answers at once, rounded as `Programs.row_bucket` does.
      tokens, tiles: of a prompt.
      new_tokens: slots for an answer.
    """
    graphdef, shapes = model_params.abstract(
        lambda: Pangea(config, rngs=nnx.Rngs(0), dtype=config.dtype)
    )
    placed = sharding.param_shardings(shapes, mesh)
    params = {name: _shape(x, placed[name]) for name, x in shapes.items()}
    programs = Programs(model_params.merge(graphdef, params), mesh)
    whole, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, sharding.BATCH_SPEC)
    row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)  # noqa: E731

    def settings(n: int):
        """As `batching` gives them: sampling, stop ids, limits, and who wants log-probabilities."""
        sampling = jax.tree.map(lambda x: _shape(x, by_row), Sampling.make(n))
        stop_ids = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
        return sampling, stop_ids, row(n), row(n, dtype=bool)

    rows, read, side = programs.row_bucket(rows), programs.row_bucket(1), config.vision.image_size
    names = ("tokens", "image_index", "positions", "segment_ids")
    pixels = row(read, tiles, side, side, 3, dtype=jnp.uint8)
    prompt = Batch(**dict.fromkeys(names, row(read, tokens)), tiles=pixels)
    prefill = programs.lower("begin", prompt, *settings(read), max_new_tokens=new_tokens)
    idle = programs.lower("idle", rows, tokens, new_tokens, 0)
    begun, batch = _results(prefill, mesh), _results(idle, mesh)
    live = jax.ShapeDtypeStruct((rows,), bool, sharding=whole)
    steps = np.int32(batching.STEPS)
    return {
        "prefill": prefill,
        "insert": programs.lower("_insert", batch, begun, _shape(np.zeros(read, np.int32), whole)),
        "decode": programs.lower("advance", batch, *settings(rows), live=live, steps=steps),
    }


def counted(
    config: PangeaConfig, mesh: Mesh, *, rows: int, tokens: int, tiles: int, new_tokens: int
) -> dict[str, float]:
    """GiB on one device as `fit` counts them: `weights`, `caches` of all rows, and `reading` beside them."""
    tensor, shards = mesh.shape["tensor"], sharding.row_shards(mesh)
    each = -(-rows // shards)
    found = {
        "weights": fit.weight_bytes(config, None) / (tensor * mesh.shape["fsdp"]),
        "caches": each * fit.cache_bytes(config, tokens + new_tokens) / tensor,
        "reading": fit.row_bytes(config, tokens, tiles, 1, 0),
    }
    return {name: round(size / fit.GIB, 2) for name, size in found.items()}


def _shape(x, placed: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)


def _results(lowered: jax.stages.Lowered, mesh: Mesh):
    """The shapes of what a program returns: a `Decoding`, placed as `Programs` places it."""
    placed = output_shardings(mesh)[2]  # one for each part of the result
    spread = lambda place, part: jax.tree.map(lambda x: _shape(x, place), part)  # noqa: E731
    return jax.tree.map(spread, placed, lowered.out_info)
