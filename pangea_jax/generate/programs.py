"""The compiled programs of a model (prefill, decoding, log-likelihoods) on one device or a mesh."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from pangea_jax import sharding
from pangea_jax.generate import decode, likelihood
from pangea_jax.generate.decode import Decoding
from pangea_jax.model import KVCache, Pangea

# For keys [L, B, K, C, S] and values [L, B, K, S, C]: rows over the data axes as in any batch, key heads over "tensor"
# like their kernels.
CACHE_SPEC = P(None, *sharding.BATCH_SPEC, "tensor", None, None)


class Programs:
    """A model's parameters and the programs on them. Each shape is compiled once.

    Args:
      mesh: the devices of the parameters (`pangea_jax.sharding`); None for one device.

    Attributes:
      forward: batch -> float32 logits [B, T, V].
      begin, advance: see `decode`; `advance` donates its first argument.
      follow: `begin` for prompts that reuse the cache of a row, see `decode.follow`.
      embed, empty, fork, read_on, start: `begin` and `follow` in pieces, for long prompts.
      idle: (rows, width, max_new_tokens, stop_id, top) -> a batch that `insert` fills, see `decode.idle`.
      score: `likelihood.score`; echo: `likelihood.echo`.
    """

    def __init__(self, model: Pangea, mesh: Mesh | None):
        self.mesh = mesh
        graphdef, self.params = nnx.split(model)

        def program(function, outputs, **kwargs):
            def call(params, *args, **named):
                # `sharding.constrain` and the attention kernels read the mesh from here.
                context = contextlib.nullcontext()
                if mesh is not None:
                    context = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
                with context:
                    return function(nnx.merge(graphdef, params), *args, **named)

            compiled = jax.jit(call, **kwargs, **({"out_shardings": outputs} if mesh else {}))
            return functools.partial(self._run, compiled)

        whole, cache, decoding = output_shardings(mesh)
        new = "max_new_tokens"
        self.forward = program(lambda model, batch: model(batch), whole)
        self.begin = program(_begin, decoding, static_argnames=(new, "top"))
        self.follow = program(_follow, decoding)
        self.embed = program(_embed, whole)
        self.empty = program(_empty, cache, static_argnums=(1, 2))
        self.fork = program(_fork, cache, static_argnames=("copies", "rest"))
        self.read_on = program(
            _read_on, (whole, cache), static_argnames="size", donate_argnames="cache"
        )
        self.start = program(decode.begin, decoding, static_argnames=(new, "top"))
        self.advance = program(_advance, decoding, donate_argnums=1)
        self.idle = program(_idle, decoding, static_argnums=(1, 2, 3, 5))
        self._insert = program(_insert, decoding, donate_argnums=1)
        self.score = program(likelihood.score, whole)
        self.echo = program(likelihood.echo, whole, static_argnames="top")

    def _run(self, compiled, *args, **named):
        # The parameters are looked up at each call: in training they are replaced.
        return compiled(self.params, *args, **named)

    def lower(self, name: str, *args, **named) -> jax.stages.Lowered:
        """The program `name` for arguments of these shapes, to compile it without running it."""
        return getattr(self, name).args[0].lower(self.params, *args, **named)

    @property
    def shards(self) -> int:
        """Number of parts that the rows of a batch are split into."""
        return sharding.row_shards(self.mesh)

    def insert(self, decoding: Decoding, begun: Decoding, rows: Int[np.ndarray, " A"]) -> Decoding:
        """`decode.insert`; it donates `decoding` and drops the rows of `begun` beyond A."""
        beyond = len(decoding.done)
        missing = len(begun.done) - len(rows)
        return self._insert(decoding, begun, np.pad(rows, (0, missing), constant_values=beyond))

    def place(self, tree):
        """Pads arrays with a leading row axis with zeros to `row_bucket` rows and places them on the mesh."""

        def place(x):
            x = np.pad(x, [(0, self.row_bucket(len(x)) - len(x))] + [(0, 0)] * (x.ndim - 1))
            if self.mesh is None:
                return x
            on_rows = NamedSharding(self.mesh, sharding.BATCH_SPEC)
            return jax.make_array_from_callback(x.shape, on_rows, lambda index: x[index])

        return jax.tree.map(place, tree)

    def row_bucket(self, rows: int) -> int:
        """The number of rows after padding: every shard has 1, 2, 4 or a multiple of 8."""
        each = -(-rows // self.shards)
        each = 1 << (each - 1).bit_length() if each <= 8 else each + -each % 8
        return each * self.shards


def output_shardings(mesh: Mesh | None):
    """Shardings of outputs that every host reads (replicated), of a cache, and of a `Decoding` (only its cache is
    split)."""
    if mesh is None:
        return None, None, None
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, CACHE_SPEC)
    cache = KVCache(split, split, whole, whole, whole)
    return whole, cache, Decoding(whole, whole, whole, whole, cache, whole)


# What follows is compiled by `Programs`; the shapes are those of `decode`.


def _idle(model, rows, width, max_new_tokens, stop_id, top=0):
    cache = model.language.empty_cache(rows, width + max_new_tokens, model.config.dtype)
    return decode.idle(cache, max_new_tokens, stop_id, top)


def _insert(_, decoding, begun, rows):
    return decode.insert(decoding, begun, rows)


def _begin(model, batch, sampling, stop_ids, limit, wants=None, *, max_new_tokens, top=0):
    """Prefills and chooses the first tokens; the cache has no free slots."""
    hidden, cache = model.prefill(batch, batch.tokens.shape[1])
    last, lengths = decode.last_hidden(hidden, jnp.asarray(batch.segment_ids))
    settings = {"limit": limit, "stop_ids": stop_ids, "sampling": sampling, "wants": wants}
    return decode.begin(
        model, last, lengths, cache, max_new_tokens=max_new_tokens, top=top, **settings
    )


def _follow(model, decoding, source, batch, sampling, stop_ids, limit, wants=None):
    """`source`: the row with the shared prefix, and the number of its tokens."""
    start = decode.follow(model, decoding, *source, batch.tokens, batch.segment_ids)
    new = decoding.tokens.shape[1]
    top = decoding.likely.ids.shape[-1] if decoding.likely is not None else 0
    settings = {"limit": limit, "stop_ids": stop_ids, "sampling": sampling, "wants": wants}
    return decode.begin(model, *start, max_new_tokens=new, top=top, **settings)


def _embed(model, batch):
    return model.inputs(batch)


def _empty(model, rows, slots):
    return model.language.empty_cache(rows, slots, model.config.dtype)


def _fork(_, decoding, row, shared, *, copies, rest):
    return decode.fork(decoding, row, shared, copies=copies, rest=rest)


def _read_on(model, last, cache, x, positions, segment_ids, start, *, size):
    """`decode.read_on` of `size` tokens from `start` on."""
    piece = (jax.lax.dynamic_slice_in_dim(a, start, size, 1) for a in (x, positions, segment_ids))
    return decode.read_on(model, last, cache, *piece)


def _advance(model, decoding, sampling, stop_ids, limit, wants=None, *, live, steps):
    """`decode.advance`. Rows that are not `live` have ended for the host, even if the device does not know it yet."""
    decoding = decoding.replace(done=decoding.done | ~live)
    settings = {"limit": limit, "stop_ids": stop_ids, "sampling": sampling, "wants": wants}
    return decode.advance(model, decoding, steps=steps, **settings)
