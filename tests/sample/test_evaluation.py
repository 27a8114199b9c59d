"""Models with known answers get known scores; the model reads and is scored as everywhere else."""

import dataclasses
import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from pangea_jax import sharding
from pangea_jax.batch import Batch
from pangea_jax.data import chat
from pangea_jax.data.build.write_store import Picture, write_store
from pangea_jax.data.pipeline import PipelineConfig, RowSource, train_dataset
from pangea_jax.data.reader import CachedFeatures, Reader, ReadingPolicy
from pangea_jax.data.record import Conversation, Turn
from pangea_jax.data.store import RecordStore
from pangea_jax.generate.engine import Engine
from pangea_jax.model import Pangea
from pangea_jax.model import params as model_params
from pangea_jax.sample import emoji, evaluation, examiner, turns
from pangea_jax.sample.evaluation import sheet_examples, summarize
from pangea_jax.sample.examiner import Answer, Examiner
from pangea_jax.sample.scores import BLIND, BY_METRIC
from pangea_jax.sample.tasks import NAMED, NAMES, TASKS, Item, make_items
from pangea_jax.train.optimizer import OptimizerConfig, make_optimizer
from pangea_jax.train.state import init_state
from pangea_jax.train.step import make_train_step

LANGUAGES = ("en", "sw")
THINGS = 16
PATCHES, WIDTH, TARGETS = 4, 32, 24
SIZES = {"batch_size": 12, "max_new_tokens": TARGETS}


@pytest.fixture(scope="module")
def concepts():
    """Sixteen things with different names in both languages."""
    chosen = {}
    for concept in emoji.load_concepts():
        chosen.setdefault((concept.names["en"][:2], concept.names["sw"][:2]), concept)
    return list(itertools.islice(chosen.values(), THINGS))


@pytest.fixture(scope="module")
def store(concepts, tmp_path_factory):
    """A store of these things, drawn by one artist, each named in both languages."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    directory = tmp_path_factory.mktemp("store")
    keys = [emoji.image_key("noto", concept.codepoint) for concept in concepts]
    rows = []
    for (key, concept), code in itertools.product(zip(keys, concepts, strict=True), LANGUAGES):
        question, name = turns.ask_name(concept, code, 0)
        said = (Turn("user", f"<image>\n{question}"), Turn("assistant", name))
        record = Conversation(
            id=f"{key}/{code}",
            source="emoji/noto",
            language=code,
            category=concept.category,
            images=(key,),
            turns=said,
        )
        rows.append((record, {}))
    write_store(
        directory,
        name="made",
        build="python launch/build_data.py made",
        records={"train": iter(rows)},
        images={"noto": iter([Picture(key, file.getvalue(), 8, 8) for key in keys])},
    )
    return RecordStore(directory)


@pytest.fixture(scope="module")
def views(store):
    rng = np.random.default_rng(0)
    keys = store.image_index["key"].to_pylist()
    return CachedFeatures(
        {k: rng.normal(size=(1, PATCHES, WIDTH)).astype(np.float16) for k in keys}
    )


@pytest.fixture(scope="module")
def config(tiny_config, emoji_tokenizer):
    language = dataclasses.replace(tiny_config.language, vocab_size=emoji_tokenizer.vocab_size)
    vision = dataclasses.replace(tiny_config.vision, image_size=8)
    return dataclasses.replace(tiny_config, vision=vision, language=language, pinpoints=())


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


class Trainer:
    """Trains a model on the records of a store."""

    def __init__(self, config, steps):
        self.steps = steps
        self.mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.optimizer = make_optimizer(OptimizerConfig(1e-2, b2=0.95), steps)
        self.graphdef, self.state, self.shardings = init_state(
            config, self.optimizer, self.mesh, seed=0, frozen=(r"vision\..*",)
        )
        self.start = jax.device_get(self.state.params)

    def train(self, store, views, tokenizer):
        step = make_train_step(
            self.graphdef, self.optimizer, self.shardings, self.mesh, max_targets=TARGETS
        )
        source = RowSource(store, np.tile(np.arange(store.index.num_rows), self.steps))
        shape = PipelineConfig(
            rows=store.index.num_rows, row_tokens=48, row_tiles=1, max_targets=TARGETS
        )
        batches = train_dataset(source, Reader(tokenizer, views), shape, seed=0)
        for _, batch in zip(range(self.steps), batches):
            self.state, metrics = step(self.state, batch.place(self.mesh))
        return jax.device_get(self.state.params), float(metrics["loss"])


@pytest.fixture(scope="module")
def untrained(config):
    return Trainer(config, steps=80)


@pytest.fixture(scope="module")
def asker(untrained, mesh, emoji_tokenizer):
    return Examiner(untrained.graphdef, emoji_tokenizer, mesh, **SIZES)


@pytest.fixture(scope="module")
def items(store):
    return make_items(store, "seen_artwork", LANGUAGES, ("noto",))


def of(items, metric):
    return [item for item in items if item.metric == metric]


@pytest.fixture(scope="module")
def brute_force(untrained, views, emoji_tokenizer):
    """Log-likelihoods of an item's candidates, with full forward passes and no cache."""
    forward = jax.jit(lambda params, batch: model_params.merge(untrained.graphdef, params)(batch))

    def run(params, item, keys):
        tokenizer = emoji_tokenizer
        looks = [views.stored(key, several=len(keys) > 1) for key in keys]
        places = [look.place[1] for look in looks]
        tiles = [look.place[0] for look in looks]
        options = {"tiles_per_image": tiles, "patches": PATCHES, "answer_next": True}
        prompt = chat.render(item.question, tokenizer, places, **options)
        texts = [[*tokenizer.encode(text), tokenizer.im_end_id] for text in item.candidates]
        size = len(prompt.tokens)
        tokens = np.zeros((NAMES, 160), np.int32)  # one shape for all items
        image_index = np.full_like(tokens, -1)
        for row, text in enumerate(texts):
            tokens[row, :size], image_index[row, :size] = prompt.tokens, prompt.image_index
            tokens[row, size : size + len(text)] = text
        features = np.concatenate([looks[0].cut(), looks[-1].cut()])
        batch = Batch(
            tokens=tokens,
            image_index=image_index,
            positions=np.tile(np.arange(tokens.shape[1], dtype=np.int32), (NAMES, 1)),
            segment_ids=np.ones_like(tokens),
            features=np.tile(features[None], (NAMES, 1, 1, 1)),
        )
        logits = np.asarray(forward(params, batch), np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return [
            sum(log_probs[row, size - 1 + i, id] for i, id in enumerate(text))
            for row, text in enumerate(texts)
        ]

    return run


@pytest.mark.parametrize("metric", TASKS)
def test_answers_equal_brute_force(metric, untrained, asker, items, views, brute_force):
    """A random model's answers are far from certain, so that a wrong token or picture shows."""
    params, chosen = untrained.start, of(items, metric)[:10]
    answers = asker(params, chosen, views)
    assert [answer.item for answer in answers] == chosen
    for answer in answers:
        item = answer.item
        for prefix, keys in (("", item.images), (BLIND, item.blind_images)):
            expected = np.argmax(brute_force(params, item, keys)) == 0
            assert answer.right[prefix + metric] == expected
        assert (answer.text is None) == (metric != NAMED)
        floors = {BLIND + name for name in answer.right if not name.startswith(BLIND)}
        assert floors <= set(answer.right)


def test_rows_are_split_over_devices(untrained, asker, items, views, emoji_tokenizer):
    chosen = of(items, "letter_accuracy")
    mesh = sharding.make_mesh(2, 4, 1)
    split = Examiner(untrained.graphdef, emoji_tokenizer, mesh, **SIZES)
    params = untrained.start
    assert split(params, chosen, views) == asker(params, chosen, views)


def test_log_likelihoods_equal_brute_force(
    untrained, asker, items, views, brute_force, emoji_tokenizer
):
    params, reader = untrained.start, Reader(emoji_tokenizer, views)
    chosen = of(items, NAMED)[:5]
    prompts = [asker._prompt(item, item.images, reader) for item in chosen]
    batch = Batch.fill([[asker._example(prompt, reader)] for prompt in prompts], 32, 1, PATCHES)
    _, scores = asker._name(params, batch, *asker._candidates(prompts))
    for item, found in zip(chosen, np.asarray(scores), strict=True):
        expected = brute_force(params, item, item.images)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_a_trained_model_scores_one_and_blind_zero(
    untrained, asker, items, store, views, emoji_tokenizer
):
    """An untrained model names nothing. One that learned the pictures by heart names all of them,
    and under another picture answers with that picture's name, which is never right.
    """
    items = make_items(store, "seen_artwork", LANGUAGES, ("noto",), metrics=(NAMED,))
    question = {code: turns.ask_name(emoji.load_concepts()[0], code, 0)[0] for code in LANGUAGES}
    items = [  # in the phrasing of the records
        dataclasses.replace(i, question=(Turn("user", f"<image>\n{question[i.language]}"),))
        for i in items
    ]
    before = summarize(asker(untrained.start, items, views), LANGUAGES)
    assert before["english"]["exact_match"] == before["multilingual"]["exact_match"] == 0
    params, loss = untrained.train(store, views, emoji_tokenizer)
    assert loss < 0.05
    answers = asker(params, items, views)
    after = summarize(answers, LANGUAGES)
    assert [answer.text for answer in answers] == [item.candidates[0] for item in items]
    for code in LANGUAGES:
        scores = after["languages"][code]
        # Chance is one in ten, because the picture shows none of the ten named things.
        assert scores.pop("image_blind_rank_accuracy") <= 0.5
        assert scores == {
            "exact_match": 1.0,
            "rank_accuracy": 1.0,
            "image_blind_exact_match": 0.0,
            "n": THINGS,
        }


@pytest.fixture
def scored_by(monkeypatch, untrained, mesh, emoji_tokenizer):
    """Makes an examiner of a model whose log-likelihoods are a function of the batch and the candidates."""

    def make(function):
        def score(model, batch, tails, scored):
            return function(batch, tails), None

        monkeypatch.setattr(examiner.likelihood, "score", score)
        return Examiner(untrained.graphdef, emoji_tokenizer, mesh, **SIZES)

    return make


@pytest.mark.parametrize("metric", [metric for metric in TASKS if metric != NAMED])
def test_a_model_that_always_says_the_same_scores_chance(
    metric, scored_by, items, untrained, views
):
    """Whichever answer it prefers: all are equally frequent, with the item's own pictures and blind."""
    for sign in (1, -1):

        def prefers(batch, tails, sign=sign):  # always in the same order
            return sign * (tails * (1 + jnp.arange(tails.shape[-1]))).sum(-1).astype("float32")

        asker = scored_by(prefers)
        summary = summarize(asker(untrained.start, of(items, metric), views), LANGUAGES)
        for code in LANGUAGES:
            scores, chance = summary["languages"][code], BY_METRIC[metric].chance
            assert scores == {metric: chance, BLIND + metric: chance, "n": THINGS}


def test_a_model_without_preference_is_never_right(scored_by, items, untrained, views):
    asker = scored_by(lambda batch, tails: jnp.zeros(tails.shape[:2]))
    for answer in asker(untrained.start, of(items, "letter_accuracy"), views):
        assert not any(answer.right.values())


def test_a_model_that_compares_the_pictures_answers_by_them(
    scored_by, items, untrained, views, emoji_tokenizer
):
    """It points at the picture with the larger features. So the score and its floor are known."""
    phrases = turns.PHRASES["en"]
    first, second = (emoji_tokenizer.encode(text) for text in (phrases.first, phrases.second))
    place = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)

    def larger(batch, tails):
        means = batch.features.astype("float32").mean((2, 3))
        wants_first = means[:, 0] > means[:, 1]
        says_first = tails[:, :, place] == first[place]
        return (says_first == wants_first[:, None]).astype("float32")

    chosen = [i for i in of(items, "two_pictures_accuracy") if i.language == "en"]
    mean = lambda key: views.stored(key, True).cut().astype("float32").mean()  # noqa: E731

    def expected(item, keys):
        return (mean(keys[0]) > mean(keys[1])) == (item.candidates[0] == phrases.first)

    for answer in scored_by(larger)(untrained.start, chosen, views):
        item = answer.item
        assert answer.right == {
            "two_pictures_accuracy": expected(item, item.images),
            "image_blind_two_pictures_accuracy": expected(item, item.blind_images),
        }


def test_the_floor_of_a_model_that_sees_nothing_is_its_score(untrained, asker, items, views):
    blinded = {
        name: np.zeros_like(value) if name.startswith("projector.") else value
        for name, value in untrained.start.items()
    }
    answers = asker(blinded, [item for item in items if item.language == "sw"], views)
    assert len({answer.text for answer in answers}) > 1
    for answer in answers:
        for name in [name for name in answer.right if not name.startswith(BLIND)]:
            assert answer.right[name] == answer.right[BLIND + name]


@pytest.mark.parametrize(
    "changes",
    [{}, {"newline": False}, {"pinpoints": ((8, 16), (16, 8), (16, 16))}],
    ids=["one tile", "no newline", "anyres"],
)
@pytest.mark.parametrize("metric", [NAMED, "two_pictures_accuracy"])
def test_the_model_reads_a_question_as_it_is_asked_through_the_engine(
    config, mesh, store, emoji_tokenizer, changes, metric
):
    config, policy = dataclasses.replace(config, **changes), ReadingPolicy(background=(1, 2, 3))
    options = {"limit": 1, "metrics": (metric,)}
    (item,) = make_items(store, "seen_artwork", ("en",), ("noto",), **options)
    model = Pangea(config, rngs=nnx.Rngs(0))
    pictures = evaluation._pictures(model, store, item.images, mesh, policy, augmented=0)
    graphdef, params = model_params.split(model)
    asker, reader = (
        Examiner(graphdef, emoji_tokenizer, mesh, batch_size=8, max_new_tokens=4),
        Reader(emoji_tokenizer, pictures),
    )
    mine = asker._example(asker._prompt(item, item.images, reader), reader)
    (turn,) = item.question
    images = [store.image(key) for key in item.images]
    message = {"role": "user", "content": turn.text, "images": images}
    asked = Engine(model, emoji_tokenizer, policy=policy).read([message])
    np.testing.assert_array_equal(mine.tokens, asked.tokens)
    np.testing.assert_array_equal(mine.image_index, asked.image_index)
    assert len(mine.pictures) == len(asked.tiles) >= len(images)
    same = dataclasses.replace(item, blind_images=item.images)
    (answered,) = asker(params, [same], pictures)
    assert answered.right[metric] == answered.right[BLIND + metric]


def answer(language, *right, metric=NAMED):
    item = Item(metric, "seen_artwork", language, (Turn("user", "<image>?"),), (), (), ("x", "y"))
    names = ("exact_match", metric) if metric == NAMED else (metric,)
    columns = (*names, *(BLIND + name for name in names))
    return Answer(item, dict(zip(columns, right, strict=True)))


def test_summary_by_hand():
    answers = [
        answer("en", True, True, False, False),
        answer("en", False, True, False, True),
        answer("sw", True, False, True, False),
        answer("sw", False, False, False, False),
        answer("sw", False, False, False, False),
        answer("sw", False, True, False, False),
        answer("zh", True, True, False, False),
    ]
    letters = [
        dataclasses.replace(
            answer(one.item.language, i % 2 == 0, i % 4 == 0, metric="letter_accuracy")
        )
        for i, one in enumerate(answers)
    ]
    summary = summarize([*answers, *letters], ("en", "sw", "zh"))
    assert summary["english"] == summary["languages"]["en"]
    assert summary["english"] == {
        "exact_match": 0.5,
        "rank_accuracy": 1.0,
        "letter_accuracy": 0.5,
        "image_blind_exact_match": 0.0,
        "image_blind_rank_accuracy": 0.5,
        "image_blind_letter_accuracy": 0.5,
        "n": 2,
    }
    assert summary["languages"]["sw"] == {
        "exact_match": 0.25,
        "rank_accuracy": 0.25,
        "letter_accuracy": 0.5,  # of numbers 2 to 5, the even ones
        "image_blind_exact_match": 0.25,
        "image_blind_rank_accuracy": 0.0,
        "image_blind_letter_accuracy": 0.25,  # number 4
        "n": 4,
    }
    # The mean over languages, not over answers.
    assert summary["multilingual"] == {
        "exact_match": 0.625,
        "rank_accuracy": 0.625,
        "letter_accuracy": 0.75,
        "image_blind_exact_match": 0.125,
        "image_blind_rank_accuracy": 0.0,
        "image_blind_letter_accuracy": 0.125,
        "n": 5,
    }
    assert summarize(answers[:2], ("en",))["multilingual"] is None
    assert summarize(answers[2:], ("sw", "zh"))["english"] is None


def test_unequal_numbers_of_answers_are_an_error():
    answers = [answer("en", *[True] * 4)] * 2 + [answer("en", True, True, metric="letter_accuracy")]
    with pytest.raises(ValueError, match=r"language 'en' has these numbers .*'letter_accuracy': 1"):
        summarize(answers, ("en",))
    with pytest.raises(ValueError, match=r"language 'sw' has these numbers of answers: \{\}"):
        summarize(answers, ("sw",))


def test_the_sheet_has_names_of_new_things_in_each_language_in_turn(store, items):
    answers = [
        Answer(item, {}, "said" if item.metric == NAMED else None)
        for item in items
        if item.metric in (NAMED, "letter_accuracy")
    ]
    examples = sheet_examples(answers, store, ReadingPolicy(), count=10, seed=1)
    assert [example.language for example in examples] == list(LANGUAGES) * 5
    names = {i.candidates[0] for i in of(items, NAMED)}
    assert len({example.truth for example in examples} & names) == 10
    assert all(
        example.answer == "said" and "<image>" not in example.question for example in examples
    )
    other = sheet_examples(answers, store, ReadingPolicy(), count=10, seed=2)
    assert [e.truth for e in other] != [e.truth for e in examples]


@pytest.mark.parametrize("field", ["limit", "batch_size", "max_new_tokens"])
def test_settings_of_no_size_are_errors(field):
    with pytest.raises(ValueError, match=f"eval.{field} is 0; expected 1 or more"):
        evaluation.Evaluation(**{field: 0})
