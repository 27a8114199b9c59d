"""One optimisation step, jitted over the mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from pangea_jax.model import params as model_params
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
    remat: bool = False,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """`step(state, batch) -> (state, metrics)`; the state given is donated.

    Metrics are float32 scalars over the global batch: `loss` (mean over trained tokens),
    `accuracy` (teacher-forced, per trained token), `grad_norm` before clipping, and the counts
    `target_tokens`, `tokens` (without padding) and `examples`.
    """

    def loss_fn(trainable, frozen, batch):
        model = model_params.merge(graphdef, trainable | frozen)
        hidden = model.hidden(batch, remat=remat)
        loss, count, hits = cross_entropy(
            model.language, hidden, batch["targets"], batch["weights"], max_targets=max_targets
        )
        return loss / jnp.maximum(count, 1), (count, hits)

    def step(state, batch):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (count, hits)), grads = grad_fn(state.trainable, state.frozen, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        segments = batch["segment_ids"]
        metrics = {
            "loss": loss,
            "accuracy": hits / jnp.maximum(count, 1),
            "grad_norm": optax.tree.norm(grads),
            "target_tokens": count,
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
