"""Prompts that begin as one that was read already: nothing is read twice, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pangea_jax
from pangea_jax.batch import Batch
from pangea_jax.generate.decode import Sampling, advance, begin, follow, idle, insert, last_hidden
from pangea_jax.generate.prompt import Prompt
from pangea_jax.model import params as model_params

NEW = 24
STORY = "river the over mountain " * 14


@pytest.fixture(scope="module")
def sample():
    return pangea_jax.load("sample")


@pytest.fixture(scope="module")
def pictures():
    """Two that differ in a spot of four pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    other = pixels.copy()
    other[30:32, 30:32] ^= 255
    return Image.fromarray(pixels), Image.fromarray(other)


@pytest.fixture
def reads(sample, monkeypatch):
    """(rows, tokens) of everything that is read, whole and after a row."""
    found = {"begin": [], "follow": []}

    def watch(name, place):
        program = getattr(sample._programs, name)

        def call(*args, **kwargs):
            batch = args[place]
            found[name].append((int((batch.segment_ids.sum(1) > 0).sum()), batch.tokens.shape[1]))
            return program(*args, **kwargs)

        monkeypatch.setattr(sample._programs, name, call)

    watch("begin", 0)
    watch("follow", 2)
    return found


def ask(text, picture=None):
    return [{"role": "user", "content": text} | ({"images": [picture]} if picture else {})]


def alone(sample, asked):
    return [sample.generate([messages], NEW, stop=[])[0] for messages in asked]


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_what_begins_alike_is_read_once(sample, reads, rows):
    """Questions after one long text: their ends alone are read, several at once where there are rows."""
    asked = [ask(f"{STORY}\n{end}?") for end in ("a", "b c", "paka", "what", "mbwa", "x", "y", "z")]
    asked += [ask(f"{STORY}\n{i}?") for i in range(8)]
    expected = alone(sample, asked)
    whole = max(tokens for _, tokens in reads["begin"])
    reads["begin"].clear()
    assert sample.generate(asked, NEW, stop=[], batch_size=rows) == expected
    assert reads["begin"] == [(1, whole)]
    assert sum(read for read, _ in reads["follow"]) == 15
    assert {tokens for _, tokens in reads["follow"]} == {64}
    assert max(read for read, _ in reads["follow"]) == {1: 1, 2: 1, 16: 8}[rows]


def test_what_a_row_read_after_another_serves_up_to_there(sample, reads):
    """The second prompt's own words lie in other slots than the first's: a third that shares them reads them again."""
    more = "paka mbwa kalamu " * 8
    asked = [ask(STORY), ask(f"{STORY}\n{more}a?"), ask(f"{STORY}\n{more}b?")]
    expected = alone(sample, asked)
    prompts = [(sample.read(messages, NEW), Sampling.make(1)) for messages in asked]
    found = dict(sample.serve(prompts, NEW, rows=3, width=512, stop=[]))
    assert [found[i] for i in range(3)] == expected
    assert [tokens for _, tokens in reads["follow"]] == [128, 128]


def test_pictures_are_the_same_or_nothing_is(sample, pictures, reads):
    same, other = pictures
    asked = [ask(f"{STORY}{i}", p) for p in (same, same, other, None) for i in range(2)]
    expected = alone(sample, asked)
    reads["begin"].clear()
    # In this order every prompt has a neighbour with another picture, and finds its own in another row.
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    found = sample.generate([asked[i] for i in order], NEW, stop=[], batch_size=4)
    assert found == [expected[i] for i in order]
    assert len(reads["begin"]) == 3 and len(reads["follow"]) == 5


def test_there_are_slots_for_the_rest_or_all_is_read(sample, pictures, reads):
    """A picture that ends where the slots of the words after it would begin."""

    def messages(words, end):
        parts = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": end}]
        text = {"type": "text", "text": "the " * words}
        return [{"role": "user", "content": [text, *parts]}]

    words = next(n for n in range(80, 200) if len(sample.read(messages(n, "a")).tokens) % 64 == 0)
    asked = [messages(words, end) for end in ("a", "b")]
    assert sample.read(asked[0]).pictures_end > len(sample.read(asked[0]).tokens) - 64
    expected = alone(sample, asked)
    assert sample.generate(asked, NEW, stop=[]) == expected
    assert reads["follow"] == []
    # With a word more there is room.
    wider = [*asked, ask("the " * (words + 40))]
    assert sample.generate(wider, NEW, stop=[])[:2] == expected
    assert len(reads["follow"]) == 1


def test_short_and_unlike_prompts_are_read_whole(sample, pictures, reads):
    asked = [ask(text, pictures[0]) for text in ("a", "b", "c " * 120, "d " * 120, "c " * 40)]
    expected = alone(sample, asked)
    assert sample.generate(asked, NEW, stop=[]) == expected
    assert reads["follow"] == []


def test_a_mesh_says_the_same_after_a_row(sample):
    asked = [ask(f"{STORY}{i}") for i in range(12)]
    spread = pangea_jax.load("sample", mesh={"data": 4, "fsdp": 2})
    assert spread.generate(asked, NEW, stop=[], batch_size=6) == alone(sample, asked)


def test_what_two_prompts_share():
    def prompt(tokens, picture=None):
        index = np.full(len(tokens), -1, np.int32)
        if picture is not None:
            index[2:4] = 1, 2
        tiles = np.full((int(picture is not None), 4, 4, 3), picture or 0, np.uint8)
        return Prompt(np.array(tokens, np.int32), index, tiles)

    one = prompt([5, 6, 7, 7, 8], 1)
    assert one.shared(prompt([5, 6, 7, 7, 8, 9], 1)) == 5
    assert one.shared(prompt([5, 6, 7, 7, 9], 1)) == 4
    assert one.shared(prompt([5, 6, 7, 7, 8], 2)) == 2  # another picture
    assert one.shared(prompt([5, 6, 7, 7, 8])) == 2  # words of the same ids
    assert one.shared(prompt([4, 6, 7, 7, 8], 1)) == 0
    assert (one.pictures_end, prompt([1, 2, 3, 4]).pictures_end) == (4, 0)
    assert one.rest(4).tokens.tolist() == [8] and one.rest(4).tiles.shape == (0, 4, 4, 3)


def test_following_equals_reading_whole(tiny_config, tiny_model):
    """Hidden states and cached keys after a row that has gone on, has ended, and is full of NaN elsewhere."""
    rng = np.random.default_rng(1)
    P, W, T, shared = 20, 32, 8, 17
    graphdef, params = model_params.split(tiny_model)
    settings = {"limit": 6, "stop_ids": jnp.array([-1])}

    def batch(tokens, lengths):
        width = tokens.shape[1]
        inside = np.arange(width) < np.array(lengths)[:, None]
        return Batch(
            tokens=tokens * inside,
            image_index=np.full(tokens.shape, -1, np.int32),
            positions=np.arange(width, dtype=np.int32) * inside,
            segment_ids=inside.astype(np.int32),
            tiles=np.zeros((len(tokens), 0, 16, 16, 3), np.uint8),
        )

    first = rng.integers(4, 100, (1, P), np.int32)
    lengths = np.array([3, 8, 0])
    rest = batch(rng.integers(4, 100, (3, T), np.int32), lengths)

    @jax.jit
    def answered(params):
        model = model_params.merge(graphdef, params)
        hidden, cache = model.prefill(batch(first, [P]), P)
        begun = begin(
            model, *last_hidden(hidden, jnp.ones((1, P), int)), cache, max_new_tokens=6, **settings
        )
        state = idle(model.language.empty_cache(2, W + 6, tiny_config.dtype), 6, -1)
        return advance(model, insert(state, begun, jnp.array([1])), steps=9, **settings)

    state = answered(params)
    assert state.done.all()
    k = state.cache.k.at[..., 1, :, :, shared:].set(jnp.nan)
    v = state.cache.v.at[..., 1, :, shared:, :].set(jnp.nan)
    state = state.replace(cache=state.cache.replace(k=k, v=v))

    @jax.jit
    def after(params, state):
        model = model_params.merge(graphdef, params)
        ids = rest.tokens, rest.segment_ids
        return follow(model, state, jnp.int32(1), jnp.int32(shared), *ids)

    hidden, whole, cache = after(params, state)
    assert whole.tolist() == [shared + 3, shared + 8, 0]
    assert cache.segment_ids.shape == (3, W) and int(cache.length) == W
    for row, length in enumerate(lengths[:2]):
        tokens = np.concatenate([first[0, :shared], rest.tokens[row, :length]])[None]
        expected, read = tiny_model.prefill(batch(tokens, [tokens.shape[1]]), tokens.shape[1])
        np.testing.assert_allclose(hidden[row], expected[0, -1], atol=2e-5)
        slots = np.flatnonzero(cache.segment_ids[row])
        slots = slots[np.argsort(cache.positions[row][slots])]
        np.testing.assert_allclose(cache.k[:, row][..., slots], read.k[:, 0], atol=2e-5)
        np.testing.assert_allclose(cache.v[:, row][:, :, slots], read.v[:, 0], atol=2e-5)
