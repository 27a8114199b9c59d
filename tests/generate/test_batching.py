"""Continuous batching: the same answers, whoever shares the rows, and no step for what has ended."""

import random
import re

import numpy as np
import pytest

import pangea_jax
from pangea_jax.generate import batching
from pangea_jax.generate.batching import StopStrings, part_size
from pangea_jax.generate.decode import Sampling
from pangea_jax.sample.sample_store import SampleStore

NEW = 40
QUESTIONS = (
    "What is this?",
    "这是什么？",
    "Hii ni nini?",
    "a",
    "b " * 40,
    "यह क्या है?",
    "x y z " * 20,
)


@pytest.fixture(scope="module")
def sample():
    return pangea_jax.load("sample")


@pytest.fixture(scope="module")
def asked():
    pictures = [SampleStore().image(f"twemoji/{code}") for code in ("1f408", "1f34c", "1f339")]
    return [
        [{"role": "user", "content": text} | ({"images": [pictures[i // 3]]} if i % 3 == 0 else {})]
        for i, text in enumerate(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def free(sample, asked):
    """Answers that nothing ends, each alone."""
    return [sample.generate([messages], NEW, stop=[])[0] for messages in asked]


@pytest.fixture
def steps(sample, monkeypatch):
    """How often the device is asked for more tokens."""
    calls = []
    advance = sample._programs.advance
    monkeypatch.setattr(
        sample._programs,
        "advance",
        lambda *args, **kwargs: calls.append(1) or advance(*args, **kwargs),
    )
    return calls


def test_few_rows_answer_many_prompts(sample, asked, free):
    for rows in (1, 3, 8):
        assert sample.generate(asked, NEW, stop=[], batch_size=rows) == free
    assert len(set(free)) == len(free)


def test_answers_come_as_they_are_done(sample, asked, free):
    """Prompts are asked for when there is a row for them, and a short answer does not wait for a long one."""
    taken, order = [], [3, 0, 1, 2]

    def feed():
        for i in order:
            taken.append(i)
            yield sample.read(asked[i], NEW), Sampling.make(1)

    stop = free[1][:2]
    answers = sample.serve(feed(), NEW, rows=1, width=128, stop=[], stop_strings=[stop])
    number, text = next(answers)
    assert (number, text) == (0, free[3].split(stop)[0])
    assert len(taken) == 2  # the next is read while the device works
    assert [order[number] for number, _ in answers] == [0, 1, 2]


def test_stop_strings_save_steps_and_change_nothing(sample, asked, free, steps):
    whole = -(-(NEW - 1) // batching.STEPS)
    for messages, text in zip(asked, free, strict=True):
        stop = text[:2][-1]
        steps.clear()
        (found,) = sample.generate([messages], NEW, stop=[], stop_strings=[stop, "never in it"])
        assert found == text.split(stop)[0]
        assert len(steps) == 1
        steps.clear()
        assert sample.generate([messages], NEW, stop=[]) == [text]
        assert len(steps) == whole
    # The same one for all, in whose answers it is found early, late or never.
    stop = free[0][0]
    cut = [text.split(stop)[0] for text in free]
    assert sample.generate(asked, NEW, stop=[], stop_strings=[stop], batch_size=2) == cut
    assert cut != free


def test_what_a_stop_string_cuts_is_known_for_sure():
    """At whatever prefix a row is stopped, its text is cut where the whole one would be."""
    chance = random.Random(0)
    sure = 0
    for _ in range(2000):
        text = "".join(chance.choices("ab", k=12))
        stops = {"".join(chance.choices("ab", k=chance.randint(1, 5))) for _ in range(3)}
        ends = StopStrings(stops)
        assert ends.cut(text) == text[: min((text.find(s) for s in stops if s in text), default=12)]
        for length in range(12):
            if ends.surely_in(text[:length]):
                sure += 1
                assert ends.cut(text[:length]) == ends.cut(text)
    assert sure > 1000
    # A character whose last bytes are to come is not counted yet.
    assert not StopStrings(["a", "xay猫"]).surely_in("xay\ufffd")
    assert StopStrings(["a", "xay猫"]).surely_in("xayz")


@pytest.mark.parametrize("stops", ["\n", [""], [3]])
def test_stop_strings_are_texts(sample, asked, stops):
    with pytest.raises(ValueError, match="is not a list of texts"):
        sample.generate(asked[:1], NEW, stop_strings=stops)


@pytest.mark.parametrize("rows", [1, 3])
def test_no_more_answers_are_under_way_than_asked_for(sample, asked, rows):
    """The device computes 1 and 4 rows."""
    prompt, taken, most = sample.read(asked[3], NEW), [], 0

    def feed():
        for number in range(20):
            taken.append(number)
            yield prompt, Sampling.make(1)

    answers = sample.serve(feed(), NEW, rows=rows, width=64, stop=[])
    for done, _ in enumerate(answers):
        most = max(most, len(taken) - done)
    assert done == 19 and most <= 2 * rows  # as many again are read ahead


def test_a_row_less_than_one_is_no_batch(sample, asked):
    for batch_size in (0, -1):
        with pytest.raises(
            ValueError, match=f"batch_size must be a whole number of at least 1, not {batch_size}"
        ):
            sample.generate(asked, NEW, batch_size=batch_size)
        with pytest.raises(
            ValueError, match=f"batch_size must be a whole number of at least 1, not {batch_size}"
        ):
            sample.loglikelihood([], batch_size=batch_size)
        with pytest.raises(ValueError, match=f"rows must be at least 1, not {batch_size}"):
            next(sample.serve([], NEW, rows=batch_size, width=64))


def test_a_prompt_wider_than_the_batch_is_refused(sample, asked):
    prompt = sample.read(asked[4], NEW)
    assert sample.shape(prompt)[0] == 128
    with pytest.raises(ValueError, match=r"a prompt of 128 tokens, as padded, .* of width 64"):
        next(sample.serve([(prompt, Sampling.make(1))], NEW, rows=1, width=64))


def test_part_sizes():
    short, long, picture = (64, 0), (640, 0), (64, 5)
    assert part_size([long, long], 8, 1) == 1
    assert part_size([short] * 20, 20, 1) == 8
    assert part_size([short] * 20, 7, 1) == 1  # one size less to compile
    assert part_size([short] * 7 + [picture] * 9, 20, 1) == 1
    assert part_size([short] * 40, 40, 4) == 32
    assert part_size([short] * 6 + [picture] * 9, 20, 4) == 4  # one for each shard
    assert part_size([long] * 3, 20, 4) == 3


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, "auto"])
def test_a_mesh_says_the_same(sample, asked, free, sizes):
    """Eight devices; the cache over them, rows and key heads, and answers and scores as on one."""
    spread = pangea_jax.load("sample", mesh=sizes)
    shape = spread.mesh.shape
    assert spread.mesh.size == 8 and shape["data"] > 1
    programs = spread._programs
    cache = programs.idle(programs.row_bucket(8), 64, 64, 0).cache
    L, B, K, C, S = cache.k.shape
    expected = (L, B // programs.shards, K // shape["tensor"], C, S)
    assert cache.k.sharding.shard_shape(cache.k.shape) == expected
    assert spread.generate(asked, NEW, stop=[], batch_size=3) == free
    items = [sample.candidates(messages, (" cat", "猫", " a dog")) for messages in asked]
    ours, theirs = (e.loglikelihood(items, batch_size=4) for e in (spread, sample))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose([x.total for x in a], [x.total for x in b], atol=2e-4)
        assert [x[1:] for x in a] == [x[1:] for x in b]


def test_the_cache_stays_where_it_is(sample, asked):
    """What moves between devices when a prompt enters is no larger than its own cache."""
    spread = pangea_jax.load("sample", mesh={"data": 8})
    programs = spread._programs
    state = programs.idle(16, 256, 64, 0)
    chosen = programs.place(Sampling.make(1)), np.array([-1], np.int32), np.int32(NEW)
    batch = spread._batch([spread.read(asked[3])])
    begun = programs.begin(batch, *chosen, max_new_tokens=64)
    rows = np.array([1] + [16] * 7, np.int32)
    program = programs._insert.args[0].lower(programs.params, state, begun, rows).compile()
    largest = begun.cache.k.size
    assert largest < state.cache.k.size / 4
    sent = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program.as_text())
    assert sent and max(np.prod([int(n) for n in dims.split(",")]) for dims in sent) <= largest


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"rows": 2}, "mesh has no axis 'rows'; it has data"), ({"tensor": 3}, "does not fill the 8")],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        pangea_jax.load("sample", mesh=sizes)
