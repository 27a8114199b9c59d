"""Every attention backend equals attention in float64 NumPy."""

import itertools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pangea_jax import sharding
from pangea_jax.model import attention as attention_module
from pangea_jax.model.attention import BACKENDS, AttentionImpl, attention, cached_attention
from pangea_jax.model.attention import kernels as kernels
from pangea_jax.model.attention.segments import ranges

C = 64


def rows_of(*rows, length):
    """segment_ids and positions of packed rows, given as lengths of their segments."""
    ids, positions = np.zeros((2, len(rows), length), np.int32)
    for b, segments in enumerate(rows):
        starts = np.cumsum([0, *segments])
        for segment, (start, stop) in enumerate(itertools.pairwise(starts), start=1):
            ids[b, start:stop] = segment
            positions[b, start:stop] = np.arange(stop - start)
    return ids, positions


def random_qkv(B, T, H, K, dtype=np.float32):
    """Queries, keys, values, and the cotangent of the output."""
    rng = np.random.default_rng((B, T, H, K))
    shapes = (B, T, H, C), (B, T, K, C), (B, T, K, C), (B, T, H, C)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def reference(q, k, v, cotangent, ids, positions):
    """Outputs and gradients with respect to q, k and v, float64, head by head."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    seen = (ids[:, :, None] == ids[:, None]) & (positions[:, None] <= positions[:, :, None])
    out, grads = np.zeros_like(q), tuple(map(np.zeros_like, (q, k, v)))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        kv = h // (q.shape[2] // k.shape[2])
        queries, keys, values, up = q[b, :, h], k[b, :, kv], v[b, :, kv], cotangent[b, :, h]
        weights = np.exp(np.where(seen[b], queries @ keys.T / np.sqrt(C), -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        out[b, :, h] = weights @ values
        slope = up @ values.T
        slope = weights * (slope - (weights * slope).sum(-1, keepdims=True)) / np.sqrt(C)
        grads[0][b, :, h] = slope @ keys
        grads[1][b, :, kv] += slope.T @ queries
        grads[2][b, :, kv] += weights.T @ up
    return out, *grads


@jax.jit(static_argnames="impl")
def outputs_and_gradients(q, k, v, cotangent, ids, positions, impl):
    def mix(q, k, v):
        return attention(q, k, v, segment_ids=ids, positions=positions, impl=impl)

    out, pullback = jax.vjp(mix, q, k, v)
    return out, *pullback(cotangent)


CASES = {
    "packed, odd length, padding, 3 query heads a key head": (6, 2, 201, [[70, 1, 100], [201]]),
    "one head a key head, nothing packed": (2, 2, 128, [[128]]),
    "all heads share a key head, shorter than a block": (4, 1, 37, [[20, 17], [5]]),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(impl, case):
    H, K, length, rows = CASES[case]
    ids, positions = rows_of(*rows, length=length)
    q, k, v, cotangent = random_qkv(len(rows), length, H, K)
    cotangent *= (ids > 0)[..., None, None]  # the loss has no weight on padding
    expected = reference(q, k, v, cotangent, ids, positions)
    found = outputs_and_gradients(q, k, v, cotangent, ids, positions, impl)
    real = (ids > 0)[..., None, None]
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert np.isfinite(ours).all(), name  # also in padding
        error = np.abs(np.where(real, ours - theirs, 0)).max()
        assert error < 2e-6 * np.abs(theirs).max(), name


def test_bfloat16(impl):
    """The kernels keep the softmax in float32, as the reference backend does."""
    ids, positions = rows_of([70, 1, 57], length=128)
    q, k, v, cotangent = random_qkv(1, 128, 4, 2, jnp.bfloat16)
    expected = reference(q, k, v, cotangent, ids, positions)
    found = outputs_and_gradients(q, k, v, cotangent, ids, positions, impl)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(np.asarray(ours, np.float64) - theirs).max() < 0.015 * np.abs(theirs).max()


def test_every_mesh_gives_the_same(impl):
    """Rows are split over data and fsdp, heads over tensor."""
    ids, positions = rows_of([70, 58], [128], [3, 4, 5], [100, 20], length=128)
    q, k, v, cotangent = random_qkv(4, 128, 4, 2)
    mesh = sharding.make_mesh(2, 2, 2)
    heads = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor", None))
    placed = [jax.device_put(x, heads) for x in (q, k, v, cotangent)]
    with jax.set_mesh(mesh):
        found = outputs_and_gradients(*placed, ids, positions, impl)
    expected = outputs_and_gradients(q, k, v, cotangent, ids, positions, impl)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.sharding.is_equivalent_to(heads, 4)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_many_queries_go_in_chunks(monkeypatch):
    """The length is odd, so the last chunk is padded. With a cache there are more keys than queries."""
    monkeypatch.setattr(attention_module, "QUERY_CHUNK", 64)
    ids, positions = rows_of([70, 1, 100], [171], length=171)
    q, k, v, cotangent = random_qkv(2, 171, 4, 2)
    cotangent *= (ids > 0)[..., None, None]

    def mix(q, k, v):
        slots = [(0, 0), (9, 20)]
        k, v = (jnp.pad(x, [*slots, (0, 0), (0, 0)]) for x in (k, v))
        return cached_attention(
            q,
            k.transpose(0, 2, 3, 1),
            v.swapaxes(1, 2),
            segment_ids=ids,
            positions=positions,
            kv_segment_ids=jnp.pad(ids, slots),
            kv_positions=jnp.pad(positions, slots),
        )

    out, pullback = jax.jit(lambda *qkv: jax.vjp(mix, *qkv))(q, k, v)
    expected = reference(q, k, v, cotangent, ids, positions)
    real = (ids > 0)[..., None, None]
    for ours, theirs in zip((out, *pullback(cotangent)), expected, strict=True):
        error = np.abs(np.where(real, ours - theirs, 0)).max()
        assert error < 2e-6 * np.abs(theirs).max()


def test_long_rows_never_hold_all_logits():
    T = 8192
    q, k = jnp.zeros((1, T, 2, 8)), jnp.zeros((1, T, 1, 8))
    ids = jnp.ones((1, T), jnp.int32)

    def loss(q, k, v):
        return attention(q, k, v, segment_ids=ids, positions=ids, impl="xla").sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
    assert f"{T},{T}]" not in compiled.as_text()


def test_padding_reaches_no_token_and_later_tokens_neither(impl):
    ids, positions = rows_of([3, 2], length=6)
    q, k, v, _ = random_qkv(1, 6, 4, 2)

    @jax.jit
    @jax.grad
    def reach(kv):
        out = attention(q, *kv, segment_ids=ids, positions=positions, impl=impl)
        return jnp.square(out[0, 1]).sum()

    for grad in reach((k, v)):
        reached = np.abs(np.asarray(grad)[0]).sum((1, 2)) > 0
        np.testing.assert_array_equal(reached, [1, 1, 0, 0, 0, 0])


def test_without_ids_every_query_sees_every_key():
    q, k, v, _ = random_qkv(1, 5, 2, 2)
    weights = np.exp(np.einsum("BTHC,BSHC->BHTS", q, k) / np.sqrt(C))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("BHTS,BSHC->BTHC", weights, v)
    np.testing.assert_allclose(attention(q, k, v), expected, atol=1e-5)


def call(impl, T=16, B=1, H=4, K=2, C=C, dtype=jnp.bfloat16, **arguments):
    """Traces a call with ids and positions, without computing anything."""
    shapes = [jax.ShapeDtypeStruct((B, T, heads, C), dtype) for heads in (H, K, K)]
    ids = jnp.zeros((B, T), jnp.int32)
    arguments = {"segment_ids": ids, "positions": ids} | arguments
    return jax.eval_shape(lambda q, k, v: attention(q, k, v, impl=impl, **arguments), *shapes)


@pytest.mark.parametrize("name", ["splash", "triton"])
def test_a_kernel_that_cannot_serve_is_an_error(name):
    here = AttentionImpl(name, interpret=True)
    assert call(here).shape == (1, 16, 4, C)
    with pytest.raises(ValueError, match=rf"'{name}': it runs on [tg]pu, this is cpu; use impl"):
        call(name)
    for missing in ("segment_ids", "positions"):
        with pytest.raises(ValueError, match="takes segment_ids and positions"):
            call(here, **{missing: None})
    with pytest.raises(ValueError, match="head width 60 is not one of"):
        call(here, C=60)
    with pytest.raises(ValueError, match="block_kv 100 is not one of"):
        call(AttentionImpl(name, block_kv=100, interpret=True))
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        with pytest.raises(ValueError, match="6 rows do not divide over 4 devices"):
            call(here, B=6)
        with pytest.raises(ValueError, match="3 key heads do not divide over 2 devices"):
            call(here, B=4, H=6, K=3)


def test_unknown_backends_and_uneven_heads_are_errors():
    with pytest.raises(ValueError, match="impl 'fast' is not one of"):
        call("fast")
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        call("xla", H=3)


@pytest.fixture
def chosen(monkeypatch, caplog):
    """Runs `auto` as if on an accelerator. Returns the kernel that was called and the log."""
    attention_module._log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger="absl")

    def choose(platform, devices=1, **arguments):
        called = ["xla"]
        monkeypatch.setattr(kernels, "platform", lambda: platform)
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        monkeypatch.setattr(
            kernels, "run", lambda impl, q, *_: (called.append(impl.name), jnp.zeros(q.shape))[1]
        )
        call("auto", **arguments)
        return called[-1], [record.message for record in caplog.records]

    return choose


def test_auto_takes_the_kernel_of_the_device(chosen):
    assert chosen("tpu")[0] == "splash"
    assert chosen("gpu")[0] == "triton"
    assert chosen("cpu", T=385)[0] == "blockwise"
    name, logged = chosen("tpu")
    assert name == "splash"
    assert len(logged) == 3  # each choice is logged once
    assert "'splash' here (packed causal rows on tpu)" in logged[0]


@pytest.mark.parametrize(
    ("platform", "arguments", "reason"),
    [
        ("rocm", {}, "there is no kernel for rocm"),
        ("cpu", {"T": 384}, "plain JAX is faster for rows of 384 tokens"),
        ("tpu", {"segment_ids": None, "positions": None}, "it takes segment_ids"),
        ("tpu", {"C": 8}, "head width 8"),
        ("tpu", {"devices": 4}, "no mesh in context"),
        ("gpu", {"dtype": jnp.float32}, "bfloat16 or float16, not float32"),
    ],
)
def test_auto_says_why_it_takes_none(chosen, platform, arguments, reason):
    name, logged = chosen(platform, **arguments)
    assert name == "xla"
    assert len(logged) == 1 and "'xla' here" in logged[0] and reason in logged[0]


def test_triton_compiles_its_kernels_for_a_gpu():
    """A machine without GPU can check this: it is lowered to Triton, repeats no keys and has no [T, T]."""
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh((1, 1, 1), sharding.AXES, axis_types, abstract_device=gpu)
    T, H, K = 2048, 28, 4
    q = jax.ShapeDtypeStruct((1, T, H, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, T, K, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def mix(q, k, v, ids, positions):
        return attention(q, k, v, segment_ids=ids, positions=positions, impl="auto")

    def lower(function):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(function).trace(q, k, k, ids, ids)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    (call,) = re.findall(r"custom_call @\S*triton\(.*", lower(mix))
    assert call.count(f"tensor<1x{T}x{K}x128xbf16>") == 2  # keys and values
    backward = lower(jax.grad(lambda *args: mix(*args).astype(jnp.float32).sum(), (0, 1, 2)))
    assert len(re.findall(r"custom_call @\S*triton\(", backward)) == 3
    assert f"{T}x{T}" not in backward


def test_every_backend_is_tested(impls):
    assert {impl.name for impl in impls} == set(BACKENDS)


@pytest.mark.parametrize("name", ["triton", "blockwise"])
def test_no_block_of_another_segment_is_read(name):
    """Segments end where blocks end. All other segments are NaN, in the forward and in the backward pass."""
    T, middle = 3 * 64, slice(64, 128)
    ids, positions = rows_of((64, 64, 64), length=T)
    q, k, v, cotangent = random_qkv(1, T, 4, 2)
    wanted = reference(q, k, v, cotangent, ids, positions)
    poisoned = [x.copy() for x in (q, k, v, cotangent)]
    for x in poisoned:
        x[:, :64] = x[:, 128:] = np.nan
    impl = AttentionImpl(name, 64, 64, interpret=True)
    found = outputs_and_gradients(*poisoned, ids, positions, impl)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got[:, middle], want[:, middle], rtol=2e-4, atol=2e-5)


def test_ranges_of_segments():
    ids = np.array([[1, 1, 2, 2, 2, 0, 0], [3, 4, 4, 4, 4, 4, 4]])
    starts, ends = ranges(jnp.asarray(ids))
    np.testing.assert_array_equal(starts, [[0, 0, 2, 2, 2, 5, 5], [0, 1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(ends, [[1, 1, 4, 4, 4, 6, 6], [0, 6, 6, 6, 6, 6, 6]])


@pytest.mark.parametrize(
    ("tokens", "block", "padded"), [(144, 48, 144), (160, 80, 160), (300, 64, 320)]
)
def test_blockwise_takes_the_blocks_that_pad_least(tokens, block, padded):
    assert kernels._blocks(AttentionImpl("blockwise"), tokens) == (block, block, padded)


def test_blockwise_walks_back_no_further_for_padding():
    """The first block is NaN. Neither the next segment nor padding reads it."""
    ids, positions = rows_of([64, 64], length=192)
    q, k, v, cotangent = random_qkv(1, 192, 4, 2)
    for x in (q, k, v, cotangent):
        x[:, :64] = np.nan
    impl = AttentionImpl("blockwise", 64, 64, interpret=True)
    for found in outputs_and_gradients(q, k, v, cotangent, ids, positions, impl):
        assert np.isfinite(found[:, 64:]).all()
