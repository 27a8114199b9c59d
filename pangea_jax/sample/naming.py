"""The sample's evaluation: how well a model names the things in emoji drawings, for each language.

There are two scores:
  exact match      the greedy answer is exactly the CLDR name;
  rank accuracy    among ten names in the same language, the true one has the highest log-likelihood
                   (chance: 10 %).
Each score has an image-blind floor: the same score when the model sees an image of something else.
A model that ignores images can lower its loss, but it cannot score above this floor.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pangea_jax.batch import Batch, Example
from pangea_jax.data import image
from pangea_jax.data.reader import CachedFeatures, Geometry, Reader, ReadingPolicy, Tiles
from pangea_jax.data.record import IMAGE_MARKER, Turn
from pangea_jax.data.store import RecordStore
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.generate.decode import complete, last_hidden, until
from pangea_jax.generate.likelihood import score_tails
from pangea_jax.model import params as model_params
from pangea_jax.sample import emoji
from pangea_jax.sample.features import frozen_features
from pangea_jax.sample.scores import AnswerExample
from pangea_jax.sharding import BATCH_SPEC

SPLITS = ("seen_artwork", "unseen_artwork")
CHOICES = 10
METRICS = ("exact_match", "rank_accuracy", "image_blind_exact_match", "image_blind_rank_accuracy")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model is evaluated; `config.eval` of the sample's configs.

    Attributes:
      prompt_tokens: number of tokens to which questions are padded.
      limit: number of things to ask about in each split; None: all.
      batch_size: number of questions that are answered together.
      max_new_tokens: length of the longest answer.
    """

    prompt_tokens: int
    limit: int | None = None
    batch_size: int = 64
    max_new_tokens: int = 16

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"eval.{field.name} is {value}; expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question about an image in one language, with ten names. The first name is the true one."""

    split: str
    language: str
    question: tuple[Turn, ...]
    image: str
    other_image: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The model's answers to an item: with its own image, and with another image (blind)."""

    item: Item
    text: str
    right: bool
    ranked_first: bool
    blind_right: bool
    blind_ranked_first: bool


def make_items(
    store: RecordStore,
    split: str,
    languages: Sequence[str],
    artists: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
) -> list[Item]:
    """The questions of a split: every thing in every language, with drawings by `artists` in turn.

    All languages have the same wrong names and the same thing in the image-blind run, so that only
    the language differs. The blind image shows none of the ten named things.

    Args:
      limit: number of things to ask about, chosen at random with the seed.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")
    concepts = {concept.codepoint: concept for concept in emoji.load_concepts()}
    columns = ("split", "position", "source", "language", "concept", "kind")
    rows = zip(*(store.index[name].to_pylist() for name in columns), strict=True)
    wanted = {f"emoji/{artist}" for artist in artists}
    records: dict[tuple[str, str], list] = {}
    for row_split, position, source, language, concept, kind in rows:
        if kind == "image" and source in wanted and language in languages:
            records.setdefault((concept, language), []).append((row_split, position))
    shown = sorted({concept for concept, _ in records})
    rng = np.random.default_rng(seed)
    asked = sorted(rng.permutation(len(shown))[:limit])
    items = []
    for place in asked:
        others = rng.permutation([i for i in range(len(shown)) if i != place])
        for turn, language in enumerate(languages):
            choices = records[shown[place], language]
            row_split, position = choices[(place + turn) % len(choices)]
            record = store.records(row_split)[position]
            names = [record.turns[-1].text]
            for other in others:
                name = concepts[shown[other]].names[language]
                if len(names) < CHOICES and name not in names:
                    names.append(name)
            artist = record.images[0].split("/")[0]
            other_image = _blind_image(store, artist, shown, others, concepts, language, names)
            items.append(
                Item(
                    split, language, record.turns[:-1], record.images[0], other_image, tuple(names)
                )
            )
    return items


def _blind_image(store, artist, shown, others, concepts, language, names):
    """A drawing by the same artist that shows none of the ten named things."""
    for other in reversed(others):
        key = emoji.image_key(artist, shown[other])
        if concepts[shown[other]].names[language] not in names and key in _image_keys(store):
            return key
    raise ValueError(f"artist {artist!r} has too few drawings for an image-blind run")


@functools.cache
def _image_keys(store: RecordStore) -> frozenset[str]:
    return frozenset(store.image_index["key"].to_pylist())


class Namer:
    """Answers items with a model. Compiles one function per shape; rows are split over the mesh."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        settings: Evaluation,
    ):
        self._tokenizer, self._mesh, self._prompt_tokens = tokenizer, mesh, settings.prompt_tokens
        self._batch_size = settings.batch_size + -settings.batch_size % mesh.size
        self._rows = NamedSharding(mesh, BATCH_SPEC)
        score = functools.partial(
            _score,
            graphdef,
            max_new_tokens=settings.max_new_tokens,
            stop_id=tokenizer.im_end_id,
        )
        self._score = jax.jit(score, out_shardings=NamedSharding(mesh, P()))

    def __call__(
        self, params: Mapping[str, Array], items: Sequence[Item], pictures: Tiles | CachedFeatures
    ) -> list[Answer]:
        """Answers every item, with its own image and blind. With features, images are shown as their view 0."""
        reader = Reader(self._tokenizer, pictures)
        order = sorted(range(len(items)), key=lambda i: self._name_tokens(items[i]))
        answers: list[Answer | None] = [None] * len(items)
        for start in range(0, len(items), self._batch_size):
            places = order[start : start + self._batch_size]
            batch = [items[i] for i in places]
            seen = self._run(params, batch, [item.image for item in batch], reader)
            blind = self._run(params, batch, [item.other_image for item in batch], reader)
            for place, item, a, b in zip(places, batch, seen, blind, strict=True):
                answers[place] = Answer(
                    item, a[0], _same(a[0], item), a[1], _same(b[0], item), b[1]
                )
        return answers

    def _run(self, params, items, images, reader) -> list[tuple[str, bool]]:
        """(greedy text, whether the true name ranks first) for each item with the given images."""
        rows = [[self._prompt(item, key, reader)] for item, key in zip(items, images, strict=True)]
        names, mask = self._names(items)
        rows += [rows[-1]] * (self._batch_size - len(rows))
        tiles = max(len(example.pictures) for (example,) in rows)
        batch = Batch.fill(rows, self._prompt_tokens, tiles, reader.pictures.patches)
        place = lambda x: jax.device_put(x, self._rows)  # noqa: E731
        tokens, scores = jax.device_get(
            self._score(params, jax.tree.map(place, batch), place(names), place(mask))
        )
        return [
            (
                self._tokenizer.decode(until(tokens[i].tolist(), [self._tokenizer.im_end_id])),
                bool(scores[i].argmax() == 0),
            )
            for i in range(len(items))
        ]

    def _prompt(self, item, key, reader):
        look = reader.pictures.stored(key, several=False)
        rendered = reader.words(item.question, [look.place], answer_next=True)
        if len(rendered.tokens) > self._prompt_tokens:
            raise ValueError(
                f"a prompt has {len(rendered.tokens)} tokens, but config.eval.prompt_tokens is "
                f"{self._prompt_tokens}; raise it"
            )
        pictures = {reader.pictures.field: reader.cut([look])}
        return Example(rendered.tokens, rendered.image_index, **pictures)

    @functools.cache  # noqa: B019 - lives as long as the run
    def _encode(self, name: str) -> list[int]:
        return [*self._tokenizer.encode(name), self._tokenizer.im_end_id]

    def _name_tokens(self, item):
        return max(len(self._encode(name)) for name in item.names)

    def _names(self, items):
        """Candidate tokens and mask [batch, 10, A]. A has few sizes, so that little is compiled."""
        longest = max(map(self._name_tokens, items))
        width = next(w for w in (8, 16, 32, 64, 128) if w >= longest)
        tokens = np.zeros((self._batch_size, CHOICES, width), np.int32)
        mask = np.zeros((self._batch_size, CHOICES, width), bool)
        for i, item in enumerate(items):
            for j, name in enumerate(item.names):
                ids = self._encode(name)
                tokens[i, j, : len(ids)], mask[i, j, : len(ids)] = ids, True
        return tokens, mask


def _score(
    graphdef: nnx.GraphDef,
    params: Mapping[str, Array],
    batch: Batch,
    names: Int[Array, "B J A"],
    mask: Bool[Array, "B J A"],
    *,
    max_new_tokens: int,
    stop_id: int,
) -> tuple[Int[Array, "B M"], Float[Array, "B J"]]:
    """Greedy tokens, and the log-likelihood of every candidate name with its end token.

    The model reads the prompt once. All J candidates of a row start from its cache.
    """
    model = model_params.merge(graphdef, params)
    if jax.default_backend() == "cpu":
        model.language.unstack()
    hidden, cache = model.prefill(
        batch, batch.tokens.shape[1] + max(max_new_tokens, names.shape[-1])
    )
    last, lengths = last_hidden(hidden, batch.segment_ids)
    settings = {"max_new_tokens": max_new_tokens, "stop_ids": jnp.array([stop_id])}
    tokens = complete(model, last, lengths, cache, **settings)
    return tokens, score_tails(model, last, lengths, cache, names, mask)[0]


def _same(text: str, item: Item) -> bool:
    return unicodedata.normalize("NFC", text.strip()) == unicodedata.normalize("NFC", item.names[0])


def evaluate(
    graphdef: nnx.GraphDef,
    params: Mapping[str, Array],
    store: RecordStore,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    languages: Sequence[str],
    artists: Sequence[str],
    settings: Evaluation,
    policy: ReadingPolicy,
    seed: int,
    cache: Path | None = None,
) -> tuple[dict[str, dict], dict[str, list[Answer]]]:
    """Scores of every split (see `summarize`) and all answers.

    The split of seen artwork has new augmented views of drawings by `artists`, or with AnyRes the
    original drawings. The split of unseen artwork has the original drawings of the test artist. The
    parameters are many because a model, its training data and the settings come from three sources.

    Args:
      policy: how the model reads conversations.
      seed: seed of the augmentation; it must differ from the seed of training.
      cache: see `pangea_jax.sample.features.frozen_features`.
    """
    model = model_params.merge(graphdef, params)
    namer = Namer(graphdef, tokenizer, mesh, settings)
    splits, answers = {}, {}
    for split, shown_by in zip(SPLITS, (artists, (emoji.TEST_ARTIST,)), strict=True):
        items = make_items(store, split, languages, shown_by, limit=settings.limit)
        keys, fresh = emoji.picture_keys(store, shown_by), int(split == "seen_artwork")
        pictures = _pictures(
            model, store, keys, mesh, policy, augmented=fresh, seed=seed, cache=cache
        )
        answers[split] = namer(params, items, pictures)
        splits[split] = summarize(answers[split], languages)
    return splits, answers


def _pictures(model, store, keys, mesh, policy, *, augmented, **options) -> Tiles | CachedFeatures:
    """How the model sees the drawings, as it saw them in training: AnyRes tiles, or features of one tile."""
    if model.config.pinpoints:
        return Tiles(Geometry.of(model.config), policy, store)
    features = frozen_features(
        model.vision, store, keys, mesh, policy, augmented=augmented, **options
    )
    views = {key: value[augmented:] for key, value in features.items()}
    return CachedFeatures(views, policy, newline=model.config.newline)


def sheet_examples(
    answers: Sequence[Answer],
    store: RecordStore,
    policy: ReadingPolicy,
    *,
    count: int,
    seed: int,
) -> list[AnswerExample]:
    """Chooses answers for the answer sheet at random: languages in turn, each with a new thing."""
    rng = np.random.default_rng(seed)
    shuffled = [answers[i] for i in rng.permutation(len(answers))]
    languages = sorted({answer.item.language for answer in answers})
    chosen, shown = [], set()
    while len(chosen) < min(count, len(shuffled)):
        language = languages[len(chosen) % len(languages)]
        fresh = (a for a in shuffled if a.item.language == language and a.item.image not in shown)
        answer = next(fresh, None)
        if answer is None:
            break
        shown.add(answer.item.image)
        chosen.append(answer)
    return [
        AnswerExample(
            picture=np.asarray(
                image.decode(
                    store.image(a.item.image),
                    background=policy.background,
                    orientation=policy.orientation,
                )
            ),
            language=a.item.language,
            question=a.item.question[-1].text.replace(IMAGE_MARKER, "").strip(),
            answer=a.text,
            truth=a.item.names[0],
            split=a.item.split,
        )
        for a in chosen
    ]


def summarize(answers: Sequence[Answer], languages: Sequence[str]) -> dict:
    """Scores of one split, in [0, 1].

    The keys are `english`, `multilingual` (the mean over the other languages) and `languages` (each
    language). The first two are None if the split has no such language.
    """
    by_language = {}
    for code in languages:
        mine = [a for a in answers if a.item.language == code]
        columns = [[a.right, a.ranked_first, a.blind_right, a.blind_ranked_first] for a in mine]
        means = np.mean(columns, axis=0).tolist()
        by_language[code] = dict(zip(METRICS, means, strict=True)) | {"n": len(mine)}
    others = [scores for code, scores in by_language.items() if code != "en"]
    mean = (
        {m: float(np.mean([scores[m] for scores in others])) for m in METRICS} if others else None
    )
    return {
        "english": by_language.get("en"),
        "multilingual": mean and mean | {"n": sum(scores["n"] for scores in others)},
        "languages": by_language,
    }
