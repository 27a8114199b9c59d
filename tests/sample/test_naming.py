import dataclasses
import io
import itertools

import jax
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
from pangea_jax.data.record import Turn
from pangea_jax.data.store import RecordStore
from pangea_jax.generate.engine import Engine
from pangea_jax.model import Pangea
from pangea_jax.model import params as model_params
from pangea_jax.sample import emoji, naming
from pangea_jax.sample.naming import Answer, Evaluation, Item, Namer, make_items, summarize
from pangea_jax.train.optimizer import OptimizerConfig, make_optimizer
from pangea_jax.train.state import init_state
from pangea_jax.train.step import make_train_step

LANGUAGES = ("en", "sw")
PATCHES, WIDTH, PROMPT, TARGETS = 4, 32, 32, 24


@pytest.fixture(scope="module")
def concepts():
    """Sixteen things with different names in both languages."""
    chosen = {}
    for concept in emoji.load_concepts():
        chosen.setdefault((concept.names["en"][:2], concept.names["sw"][:2]), concept)
    return list(itertools.islice(chosen.values(), 16))


@pytest.fixture(scope="module")
def store(concepts, tmp_path_factory):
    """A store of these things, drawn by one artist."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    directory = tmp_path_factory.mktemp("store")
    rows = [emoji.image_record("noto", c, code) for c in concepts for code in LANGUAGES]
    keys = [emoji.image_key("noto", concept.codepoint) for concept in concepts]
    write_store(
        directory,
        name="made",
        build="python launch/build_data.py made",
        records={"train": iter(rows)},
        images={"noto": iter([Picture(key, file.getvalue(), 8, 8) for key in keys])},
        columns=emoji.INDEX_COLUMNS,
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
    return sharding.make_mesh(2, 4, 1)


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
def namer(untrained, mesh, emoji_tokenizer):
    settings = Evaluation(prompt_tokens=PROMPT, max_new_tokens=TARGETS, batch_size=12)
    return Namer(untrained.graphdef, emoji_tokenizer, mesh, settings)


@pytest.fixture(scope="module")
def items(store):
    return make_items(store, "seen_artwork", LANGUAGES, ("noto",))


@pytest.fixture(scope="module")
def brute_force(untrained, views, emoji_tokenizer):
    """Log-likelihoods of an item's names, with full forward passes and no cache."""
    forward = jax.jit(lambda params, batch: model_params.merge(untrained.graphdef, params)(batch))

    def run(params, item, key):
        tokenizer = emoji_tokenizer
        look = views.stored(key, several=False)
        features, (_, index) = look.cut(), look.place
        prompt = chat.render(item.question, tokenizer, [index], patches=PATCHES, answer_next=True)
        names = [[*tokenizer.encode(name), tokenizer.im_end_id] for name in item.names]
        size = len(prompt.tokens)
        tokens = np.zeros((len(names), PROMPT + 16), np.int32)
        image_index = np.full_like(tokens, -1)
        for row, name in enumerate(names):
            tokens[row, :size], image_index[row, :size] = prompt.tokens, prompt.image_index
            tokens[row, size : size + len(name)] = name
        batch = Batch(
            tokens=tokens,
            image_index=image_index,
            positions=np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(names), 1)),
            segment_ids=np.ones_like(tokens),
            features=np.tile(features[None], (len(names), 1, 1, 1)),
        )
        logits = np.asarray(forward(params, batch), np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return [
            sum(log_probs[row, size - 1 + i, id] for i, id in enumerate(name))
            for row, name in enumerate(names)
        ]

    return run


def test_log_likelihoods_equal_brute_force(
    untrained, namer, items, views, brute_force, emoji_tokenizer
):
    params, reader = untrained.start, Reader(emoji_tokenizer, views)
    chosen = items[:5]
    prompts = [namer._prompt(item, item.image, reader) for item in chosen]
    batch = Batch.fill([[prompt] for prompt in prompts], PROMPT, 1, PATCHES)
    names, mask = (values[: len(chosen)] for values in namer._names(chosen))
    _, scores = namer._score(params, batch, names, mask)
    for item, found in zip(chosen, np.asarray(scores), strict=True):
        expected = brute_force(params, item, item.image)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_ranks_equal_brute_force(untrained, namer, items, views, brute_force):
    params = untrained.start
    answers = namer(untrained.start, items, views)
    assert [answer.item for answer in answers] == items
    for answer in answers:
        item = answer.item
        assert answer.ranked_first == (np.argmax(brute_force(params, item, item.image)) == 0)
        blind = brute_force(params, item, item.other_image)
        assert answer.blind_ranked_first == (np.argmax(blind) == 0)


def test_a_trained_model_scores_one_and_blind_zero(
    untrained, namer, items, store, views, emoji_tokenizer
):
    """An untrained model names nothing. One that learned the pictures by heart names all of them,
    and under another picture answers with that picture's name, which is never right.
    """
    before = naming.summarize(namer(untrained.start, items, views), LANGUAGES)
    assert before["english"]["exact_match"] == before["multilingual"]["exact_match"] == 0
    params, loss = untrained.train(store, views, emoji_tokenizer)
    assert loss < 0.05
    answers = namer(params, items, views)
    after = naming.summarize(answers, LANGUAGES)
    assert [answer.text for answer in answers] == [item.names[0] for item in items]
    for code in LANGUAGES:
        scores = after["languages"][code]
        assert scores == dict.fromkeys(naming.METRICS[:2], 1.0) | {
            "image_blind_exact_match": 0.0,
            "image_blind_rank_accuracy": scores["image_blind_rank_accuracy"],
            "n": 16,
        }
        # Chance is one in ten, because the picture shows none of the ten named things.
        assert scores["image_blind_rank_accuracy"] <= 0.5


@pytest.mark.parametrize(
    "changes",
    [{}, {"newline": False}, {"pinpoints": ((8, 16), (16, 8), (16, 16))}],
    ids=["one tile", "no newline", "anyres"],
)
def test_the_model_reads_a_question_as_it_is_asked_through_the_engine(
    config, mesh, store, emoji_tokenizer, changes
):
    config, policy = dataclasses.replace(config, **changes), ReadingPolicy(background=(1, 2, 3))
    (item,) = make_items(store, "seen_artwork", ("en",), ("noto",), limit=1)
    model = Pangea(config, rngs=nnx.Rngs(0))
    pictures = naming._pictures(model, store, [item.image], mesh, policy, augmented=0)
    graphdef, params = model_params.split(model)
    namer = Namer(graphdef, emoji_tokenizer, mesh, Evaluation(prompt_tokens=64, batch_size=8))
    mine = namer._prompt(item, item.image, Reader(emoji_tokenizer, pictures))
    (turn,) = item.question
    message = {"role": "user", "content": turn.text, "images": [store.image(item.image)]}
    asked = Engine(model, emoji_tokenizer, policy=policy).read([message])
    np.testing.assert_array_equal(mine.tokens, asked.tokens)
    np.testing.assert_array_equal(mine.image_index, asked.image_index)
    assert len(mine.pictures) == len(asked.tiles)
    (answered,) = namer(params, [dataclasses.replace(item, other_image=item.image)], pictures)
    assert answered.ranked_first == answered.blind_ranked_first


def test_a_prompt_that_is_too_long_is_an_error(untrained, mesh, items, views, emoji_tokenizer):
    short = Namer(untrained.graphdef, emoji_tokenizer, mesh, Evaluation(prompt_tokens=8))
    with pytest.raises(
        ValueError, match=r"a prompt has \d+ tokens, but config.eval.prompt_tokens is 8"
    ):
        short(untrained.start, items[:1], views)


@pytest.fixture(scope="module")
def sample_items(emoji_store):
    codes = ("en", "zh", "ar", "si")
    return make_items(emoji_store, "unseen_artwork", codes, ("twemoji",), limit=40, seed=3)


def test_items_have_the_true_name_first_and_ten_in_all(sample_items):
    by_picture = {concept.codepoint: concept for concept in emoji.load_concepts()}
    assert len(sample_items) == 160
    for item in sample_items:
        concept = by_picture[item.image.removeprefix("twemoji/")]
        assert item.names[0] == concept.names[item.language]
        assert len(item.names) == len(set(item.names)) == naming.CHOICES
        shown = by_picture[item.other_image.removeprefix("twemoji/")].names[item.language]
        assert shown not in item.names
        assert [turn.role for turn in item.question] == ["user"]
        assert item.names[0] not in item.question[0].text


def test_only_the_language_differs_between_languages(sample_items):
    compared = 0
    concepts = emoji.load_concepts()
    for group in zip(*[iter(sample_items)] * 4, strict=True):
        assert [item.language for item in group] == ["en", "zh", "ar", "si"]
        assert len({item.image for item in group}) == 1
        things = []
        for item in group:
            named = [
                {c.codepoint for c in concepts if c.names[item.language] == n} for n in item.names
            ]
            if all(len(codes) == 1 for codes in named):
                things.append(tuple(next(iter(codes)) for codes in named))
        distinct = set(things)
        compared += len(things) > 1
        assert len(distinct) <= 1 or _skipped_a_homonym(distinct, group, concepts)
    assert compared > 20


def _skipped_a_homonym(choices, group, concepts):
    """The lists of names differ only if a language has the same name for two things."""
    names = {c.codepoint: c.names for c in concepts}
    drawn = {code for choice in choices for code in choice}
    return any(len({names[code][i.language] for code in drawn}) < len(drawn) for i in group)


def test_items_depend_on_the_seed_and_the_artists_alternate(emoji_store):
    def make(seed, **options):
        artists = ("noto", "openmoji")
        return make_items(emoji_store, "seen_artwork", ("en", "ko"), artists, seed=seed, **options)

    assert make(0, limit=10) == make(0, limit=10)
    assert make(0, limit=10) != make(1, limit=10)
    whole = make(0)
    assert {item.image for item in make(0, limit=10)} <= {item.image for item in whole}
    artists = [item.image.split("/")[0] for item in whole]
    assert 0.4 < artists.count("noto") / len(artists) < 0.6
    for item in whole:
        assert item.other_image.split("/")[0] == item.image.split("/")[0]


def test_an_unknown_split_is_an_error(emoji_store):
    with pytest.raises(ValueError, match="split 'dev' is not one of"):
        make_items(emoji_store, "dev", ("en",), ("noto",))


def answer(language, right, first, blind_right, blind_first):
    item = Item("seen_artwork", language, (Turn("user", "<image>?"),), "a/1", "a/2", ("x",))
    return Answer(item, "x", right, first, blind_right, blind_first)


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
    summary = summarize(answers, ("en", "sw", "zh"))
    assert summary["english"] == summary["languages"]["en"]
    assert [summary["english"][m] for m in naming.METRICS] == [0.5, 1.0, 0.0, 0.5]
    assert [summary["languages"]["sw"][m] for m in naming.METRICS] == [0.25, 0.25, 0.25, 0.0]
    # The mean over languages, not over answers.
    assert [summary["multilingual"][m] for m in naming.METRICS] == [0.625, 0.625, 0.125, 0.0]
    assert [part["n"] for part in (summary["english"], summary["multilingual"])] == [2, 5]
    assert summarize(answers[:2], ("en",))["multilingual"] is None
    assert summarize(answers[2:], ("sw", "zh"))["english"] is None


@pytest.mark.parametrize(
    ("text", "same"), [(" cafe\u0301\n", True), ("caf\u00e9", True), ("cafe", False)]
)
def test_exact_match_is_up_to_unicode_form_and_outer_blanks(text, same):
    item = dataclasses.replace(answer("en", *[True] * 4).item, names=("caf\u00e9",))
    assert naming._same(text, item) is same
