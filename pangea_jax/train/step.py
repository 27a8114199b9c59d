"""One optimisation step, jitted over the mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from pangea_jax.batch import Batch
from pangea_jax.model import params as model_params
from pangea_jax.model.attention import AttentionImpl
from pangea_jax.sharding import BATCH_SPEC
from pangea_jax.train.loss import cross_entropy
from pangea_jax.train.state import TrainState


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
    *,
    max_targets: int | None = None,
    keep: str = "all",
    impl: AttentionImpl | str = "auto",
    accumulation: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Makes `step(state, batch) -> (state, metrics)`, which donates the old state.

    Metrics are float32 scalars over the global batch: `loss` (mean over trained tokens), `accuracy` (teacher-forced,
    per trained token), `grad_norm` before clipping (of all parameters and of each part, as `grad_norm/language`), the
    counts `target_tokens`, `tokens` (without padding) and `examples`, and `skipped`, which is 1 if the loss or a
    gradient was not finite. A skipped step increases the step number, but changes neither parameters nor optimiser.

    It is longer than other functions and has eight parameters, because the compiled step needs them all: three come
    from `init_state`, the others from the config.

    Args:
      max_targets: see `cross_entropy`.
      keep, impl: see `Pangea.hidden`.
      accumulation: number of parts of the batch, which are computed one after another. Every token has the same weight
        in any part. So the step equals that of the whole batch, but needs only the memory of one part. It must divide
        the number of rows of a device.
    """

    def loss_fn(trainable, frozen, batch, total):
        model = model_params.merge(graphdef, trainable | frozen)
        hidden = model.hidden(batch, keep=keep, impl=impl)
        loss, _, hits = cross_entropy(
            model.language, hidden, batch.targets, batch.weights, max_targets=max_targets
        )
        return loss / total, hits / total

    gradients = _sum_over_parts(loss_fn, shardings, mesh, accumulation)

    def update(grads, trainable, opt_state):
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    def step(state, batch):
        total = jnp.maximum(batch.weights.sum(), 1)
        # Attention kernels read the mesh from the context and split themselves over it.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            loss, accuracy, grads = gradients(state, batch, total)
        norms = _norms(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norms["grad_norm"])
        # This is a branch. To select between old and new arrays XLA would first copy the optimiser's state.
        trainable, opt_state = jax.lax.cond(
            finite, update, lambda _, *kept: kept, grads, state.trainable, state.opt_state
        )
        segments = batch.segment_ids
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            **norms,
            "skipped": ~finite,
            "target_tokens": batch.weights.sum(),
            "tokens": jnp.sum(segments > 0),
            "examples": jnp.sum(segments.max(axis=1)),
        }
        metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    return jax.jit(
        step,
        in_shardings=(shardings, NamedSharding(mesh, BATCH_SPEC)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def _sum_over_parts(loss_fn, shardings, mesh, accumulation):
    """A function (state, batch, total) -> (loss, accuracy, gradients), each summed over the parts of the batch."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(state, batch, total):
        (loss, accuracy), grads = grad_fn(state.trainable, state.frozen, batch, total)
        return loss, accuracy, grads

    if accumulation == 1:
        return gradients

    def summed(state, batch, total):
        def add(sums, part):
            return jax.tree.map(jnp.add, sums, gradients(state, part, total)), None

        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        zeros = jax.lax.with_sharding_constraint(zeros, shardings.trainable)
        start = (jnp.float32(0), jnp.float32(0), zeros)
        return jax.lax.scan(add, start, batch.split(accumulation, mesh))[0]

    return summed


def _norms(grads):
    """Norms of all gradients and of each part of the model: the first word of a parameter's name."""
    parts = {}
    for name, value in grads.items():
        part = name.partition(".")[0].removesuffix("_d")
        parts.setdefault(f"grad_norm/{part}", []).append(value)
    return {"grad_norm": optax.tree.norm(grads)} | {
        part: optax.tree.norm(values) for part, values in sorted(parts.items())
    }
