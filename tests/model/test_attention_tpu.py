"""Splash attention compiles for TPUs. No TPU is needed, because libtpu contains the compiler."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pangea_jax import sharding
from pangea_jax.batch import Batch
from pangea_jax.model import Pangea
from pangea_jax.model import params as model_params
from pangea_jax.model.attention import attention
from pangea_jax.train.optimizer import OptimizerConfig, make_optimizer
from pangea_jax.train.state import TrainState
from pangea_jax.train.step import make_train_step

# JAX caches what it compiles for TPUs. Without a TPU it cannot load that again, and warns.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
ROWS, TOKENS, HEADS, KV_HEADS = 2, 4096, 28, 4  # one row per pair of chips, the heads of Qwen2-7B


@pytest.fixture(scope="module")
def mesh():
    """Four chips: rows are split over fsdp, heads over tensor."""
    pytest.importorskip(
        "libtpu",
        reason='the TPU compiler is in libtpu: pip install "jax[tpu]"',
        exc_type=ImportError,
    )
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        # This is no TPU host, so there is no metadata server to ask for its kind.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        # libtpu's lock protects a TPU from a second process. Compiling uses no TPU.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return sharding.make_mesh(1, 2, 2, devices=topology.devices)


def kernels_of(text):
    """The Pallas kernels in compiled code, as (name, shapes of the inputs)."""
    calls = re.findall(
        r"%(splash\w+)[.\d]* = [^\n]*\"tpu_custom_call\", operand_layout_constraints=({.*?}})", text
    )
    return sorted((name, re.findall(r"\w+\[[\d,]+\]", operands)) for name, operands in calls)


def shapes_of(text):
    """Every array in compiled code, as a tuple of sizes."""
    found = set(re.findall(r"\b(?:pred|[sufb]+\d+)\[([\d,]+)\]", text))
    return {tuple(map(int, sizes.split(","))) for sizes in found}


@pytest.mark.parametrize("head_width", [64, 128])
def test_attention_and_its_gradients_compile(mesh, head_width):
    heads = NamedSharding(mesh, P(sharding.BATCH_SPEC[0], None, "tensor", None))
    rows = NamedSharding(mesh, sharding.BATCH_SPEC)
    q, k, v = (
        jax.ShapeDtypeStruct((ROWS, TOKENS, n, head_width), jnp.bfloat16, sharding=heads)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    ids = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32, sharding=rows)

    @jax.grad
    def gradients(qkv, ids, positions):
        out = attention(*qkv, segment_ids=ids, positions=positions, impl="auto")
        return jnp.square(out.astype(jnp.float32)).sum()

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(gradients).lower((q, k, v), ids, ids).compile().as_text()
    kernels = kernels_of(text)
    assert [name for name, _ in kernels] == [
        "splash_mha_dkv_segmented_no_residuals",
        "splash_mha_fwd_segmented_residuals",
    ]
    for _, operands in kernels:  # keys and values of half of the heads are not repeated
        assert operands.count(f"bf16[{KV_HEADS // 2},{TOKENS},{head_width}]") == 2
    shapes = shapes_of(text)
    assert not [shape for shape in shapes if shape.count(TOKENS) > 1]
    # The largest array holds the partial query gradients of each of the 4 blocks of keys, of one row
    # and half of the heads: nothing was gathered.
    assert max(map(np.prod, shapes)) == 4 * TOKENS * HEADS // 2 * head_width


def test_train_step_compiles(mesh, tiny_config):
    """The attention of the whole step finds the mesh."""
    config = dataclasses.replace(
        tiny_config, language=dataclasses.replace(tiny_config.language, head_width=128)
    )
    optimizer = make_optimizer(OptimizerConfig(1e-3), total_steps=10)
    graphdef, shapes = model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0)))
    placed = {
        name: NamedSharding(mesh, sharding.spec(name, leaf.shape, mesh))
        for name, leaf in shapes.items()
    }
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), shapes, {}, jax.eval_shape(optimizer.init, shapes)
    )
    rows, tokens = 4, 384
    words = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    batch = Batch(
        *(words, words, words, words),
        tiles=jax.ShapeDtypeStruct((rows, 2, 16, 16, 3), jnp.uint8),
        targets=words,
        weights=jax.ShapeDtypeStruct((rows, tokens), jnp.float32),
    )
    shardings = sharding.state_shardings(state, placed, mesh)
    step = make_train_step(graphdef, optimizer, shardings, mesh, keep="none")
    text = step.lower(state, batch).compile().as_text()
    # The forward pass, its recomputation, and the backward pass.
    assert len(kernels_of(text)) == 3
    assert not [shape for shape in shapes_of(text) if shape.count(tokens) > 1]
