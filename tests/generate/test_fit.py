"""What a card holds of a model, beside sizes that are known otherwise."""

import dataclasses
import re
import types
from pathlib import Path

import jax
import pytest
from flax import nnx

from pangea_jax import checkpoints
from pangea_jax.generate import fit
from pangea_jax.model import Pangea, PangeaConfig
from tests.checkpoints.tiny import CONFIG, TOKENS, random_state

DOCS = Path(__file__).parents[2]


def test_weights_take_what_their_arrays_take():
    arrays = jax.tree.leaves(random_state(CONFIG))
    config = dataclasses.replace(CONFIG, dtype="float32")
    assert fit.weight_bytes(config, None) == sum(array.nbytes for array in arrays)
    # docs/benchmarks.md: the files of the 7B in bfloat16 have 15.87 GB.
    assert fit.weight_bytes(PangeaConfig(), None) == pytest.approx(15.87e9, rel=1e-3)


def test_a_cache_takes_what_its_arrays_take():
    def cache():
        return Pangea(CONFIG, rngs=nnx.Rngs(0)).language.empty_cache(3, 128, CONFIG.dtype)

    made = jax.eval_shape(cache)
    sizes = [array.size * array.dtype.itemsize for array in (made.k, made.v)]
    assert 3 * fit.cache_bytes(CONFIG, 128) == sum(sizes)


def test_more_memory_holds_more():
    """Rows and context grow with the memory, and too little holds nothing."""
    size = fit.weight_bytes(PangeaConfig(), None)
    found = [
        fit.choose(PangeaConfig(), fit.Card("a card", size + gib * fit.GIB, 1e12), forms=[None])
        for gib in (0, 3, 8, 24, 80)
    ]
    assert found[:2] == [None, None]
    rows, contexts = ([getattr(f, name) for f in found[2:]] for name in ("rows", "context"))
    assert rows == sorted(set(rows)) and contexts == sorted(set(contexts))
    assert contexts[-1] <= PangeaConfig().language.max_positions - 512
    for f in found[2:]:
        batch = f.rows * fit.cache_bytes(PangeaConfig(), 4096 + 512)
        assert batch < fit.SHARE * (f.card.memory - f.weight_bytes)


def test_activations_of_half_the_size_leave_room_for_more_rows():
    size = fit.weight_bytes(PangeaConfig(), None)
    wide, narrow = (
        fit.choose(PangeaConfig(), fit.Card("a card", 3 * size, 1e12, dtype), forms=[None])
        for dtype in ("float32", "float16")
    )
    assert wide.weight_bytes == 2 * narrow.weight_bytes and wide.rows < narrow.rows
    assert (wide.form, narrow.form) == ("float32", "float16")


@pytest.mark.parametrize(
    ("kind", "capability", "name", "dtype"),
    [
        ("Tesla T4", "7.5", "T4", "float16"),
        ("NVIDIA L4", "8.9", "L4", "bfloat16"),
        ("Tesla V100-SXM2-16GB", "7.0", "Tesla V100-SXM2-16GB", "float16"),
        ("NVIDIA H200", "9.0", "NVIDIA H200", "bfloat16"),
        ("TPU v5 lite", None, "v5e-1", "bfloat16"),
    ],
)
def test_a_card_is_known_by_its_kind(monkeypatch, kind, capability, name, dtype):
    stats = {"bytes_limit": 9 * fit.GIB, "bytes_in_use": 2 * fit.GIB}
    device = types.SimpleNamespace(platform="gpu", device_kind=kind, memory_stats=lambda: stats)
    if capability:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    card = fit.this_card()
    assert (card.name, card.dtype, card.memory) == (name, dtype, 7 * fit.GIB)


def test_the_memory_of_a_cpu_is_what_is_free():
    card = fit.this_card()
    assert card.name == "CPU" and 1e8 < card.memory < 1e13


def test_a_model_that_is_named_is_never_replaced(tmp_path):
    checkpoints.save(random_state(CONFIG), CONFIG, tmp_path, tokens=TOKENS)
    card = fit.Card("a card", fit.GIB, 1e9)
    name, held, why = fit.model_for(card, str(tmp_path))
    assert name == str(tmp_path) and held.rows and why.startswith(f"{tmp_path} on a card, 1.0 GiB")
    with pytest.raises(ValueError, match=r"a card \(0.0 GiB\) does not hold"):
        fit.model_for(dataclasses.replace(card, memory=1e6), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        fit.model_for(card, "nowhere")
    assert fit.model_for(card, "sample")[:2] == ("sample", None)


def test_who_names_no_model_gets_one_that_the_card_can_do(monkeypatch):
    monkeypatch.setattr(checkpoints, "peek", lambda name: PangeaConfig())
    quick = fit.Card("a card", 80 * fit.GIB, 1e12)
    assert fit.model_for(quick)[0] == fit.PUBLISHED
    for card, why in (
        (dataclasses.replace(quick, memory=4 * fit.GIB), "does not hold"),
        (dataclasses.replace(quick, bandwidth=1e10), r"takes 1\.\d s or more for a token"),
    ):
        name, held, said = fit.model_for(card)
        assert (name, held) == ("sample", None) and re.search(why, said)


@pytest.mark.parametrize("page", ["README.md", "docs/evaluation.md"])
def test_the_tables_in_the_documents_are_computed(page):
    assert fit.table(PangeaConfig()) in (DOCS / page).read_text(encoding="utf-8")
