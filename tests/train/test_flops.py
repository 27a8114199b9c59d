"""The count of FLOPs equals XLA's count and a count by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pangea_jax.batch import Batch
from pangea_jax.model import LanguageConfig, Pangea, PangeaConfig, VisionConfig
from pangea_jax.model import params as model_params
from pangea_jax.train.flops import train_flops
from pangea_jax.train.loss import cross_entropy

ROWS, TOKENS, TILES = 2, 128, 2


def structure(config):
    return model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def config():
    """A model so wide that only matrix products matter. It is unrolled, because XLA counts the body of a loop once."""
    vision = VisionConfig(
        image_size=112, patch_size=14, width=256, layers=3, heads=2, mlp=1024, scan_unroll=2
    )
    language = LanguageConfig(
        vocab_size=1024,
        width=512,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=128,
        mlp=2048,
        scan_unroll=2,
    )
    return PangeaConfig(vision=vision, language=language, dtype="float32")


def batch_of(config):
    words, size = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32), config.vision.image_size
    return Batch(
        *(words, words, words, words),
        tiles=jax.ShapeDtypeStruct((ROWS, TILES, size, size, 3), jnp.uint8),
        targets=words,
        weights=jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.float32),
    )


def xla_flops(config, frozen):
    """XLA's count of FLOPs of the loss and its gradients."""
    graphdef, shapes = structure(config)
    names = model_params.select(shapes, frozen)
    kept = {name: leaf for name, leaf in shapes.items() if name in names}
    trained = {name: leaf for name, leaf in shapes.items() if name not in names}

    def loss(trained, kept, batch):
        model = model_params.merge(graphdef, trained | kept)
        hidden = model.hidden(batch, impl="xla")
        return cross_entropy(model.language, hidden, batch.targets, batch.weights)[0]

    # Not compiled, because XLA then counts the same products but takes many times as long.
    return jax.jit(jax.grad(loss)).lower(trained, kept, batch_of(config)).cost_analysis()["flops"]


@pytest.mark.parametrize(
    "frozen",
    [(), (r"vision\..*",), (r"vision\..*", r"language\..*", "newline_d"), (r"language\..*",)],
    ids=["everything trains", "tower frozen", "projector alone", "decoder frozen"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_agrees_with_xla(config, frozen, tied):
    language = dataclasses.replace(config.language, tied_head=tied)
    config = dataclasses.replace(config, language=language)
    counted = train_flops(
        config,
        structure(config)[1],
        tokens=ROWS * TOKENS,
        row_tokens=TOKENS,
        tiles=ROWS * TILES,
        frozen=frozen,
    )
    # Plain attention computes all pairs, not the causal half. XLA also counts other work than matrix products: 2 %.
    total = counted["total"] + counted["attention"]
    assert 1 < xla_flops(config, frozen) / total < 1.04


def test_pangea_7b_on_paper():
    """One row of 8,192 tokens and 5 tiles; Qwen2-7B and CLIP ViT-L/14-336 without its last layer."""
    config = PangeaConfig()
    parts = train_flops(config, structure(config)[1], tokens=8192, row_tokens=8192, tiles=5)
    layer = 3584 * 128 * (28 + 4 + 4) + 28 * 128 * 3584 + 3 * 3584 * 18944
    assert parts["language"] == 6 * 8192 * 28 * layer
    assert parts["head"] == 6 * 8192 * 3584 * 152064
    # Queries by keys and weights by values: 2 * 2 * T^2 * H * C, half of it causal, three passes.
    assert parts["attention"] == 28 * 3 * (4 * 8192**2 * 28 * 128) / 2
    tower_layer = 4 * 1024**2 + 2 * 1024 * 4096
    tower = 23 * (6 * 577 * tower_layer + 3 * 4 * 577**2 * 1024)
    # The pixels need no gradient, so the patch kernel has two passes.
    assert parts["vision"] == 5 * (tower + 4 * 576 * 14 * 14 * 3 * 1024)
    assert parts["projector"] == 6 * 5 * 576 * (1024 * 3584 + 3584**2)
    assert parts["total"] == pytest.approx(3.94e14, rel=0.02)


def test_only_what_is_computed_counts():
    config = PangeaConfig()
    shapes = structure(config)[1]
    batch = dict(tokens=4096, row_tokens=4096)
    everything = train_flops(config, shapes, tiles=4, **batch)
    frozen = train_flops(
        config, shapes, tiles=4, frozen=(r"vision\..*", r"language\..*", "newline_d"), **batch
    )
    # The decoder's kernels need no gradient, but pass it on. The tower has only a forward pass.
    for part in ("language", "head"):
        assert frozen[part] == everything[part] * 2 / 3
    assert frozen["attention"] == everything["attention"]
    assert frozen["vision"] == pytest.approx(everything["vision"] / 3, rel=1e-3)
    assert train_flops(config, shapes, tiles=0, **batch)["vision"] == 0
    few = train_flops(config, shapes, tiles=4, targets=512, **batch)
    assert few["head"] == everything["head"] / 8
    half = train_flops(config, shapes, tiles=4, tokens=4096, row_tokens=2048)
    assert half["attention"] == everything["attention"] / 2
