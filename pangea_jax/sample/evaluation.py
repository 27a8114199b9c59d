"""The sample's evaluation: how well a model answers questions about emoji drawings, for each language.

The scores are in the table `pangea_jax.sample.scores.SCORES`, the questions in `pangea_jax.sample.tasks`.
Each score has a chance and an image-blind floor: the same score when the model sees pictures of
something else. A model that ignores pictures can lower its loss, but it cannot score above this floor.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from pangea_jax.data import image
from pangea_jax.data.reader import CachedFeatures, Geometry, ReadingPolicy, Tiles
from pangea_jax.data.record import IMAGE_MARKER
from pangea_jax.data.store import RecordStore
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.model import params as model_params
from pangea_jax.sample import emoji
from pangea_jax.sample.examiner import Answer, Examiner
from pangea_jax.sample.features import frozen_features
from pangea_jax.sample.scores import AnswerExample
from pangea_jax.sample.tasks import SPLITS, make_items


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model is evaluated; `config.eval` of the sample's configs.

    Attributes:
      limit: number of things to ask about in each split and kind of question; None: all.
      batch_size: number of questions that are answered together.
      max_new_tokens: length of the longest answer.
    """

    limit: int | None = None
    batch_size: int = 64
    max_new_tokens: int = 16

    def __post_init__(self):
        for field in dataclasses.fields(Evaluation):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"eval.{field.name} is {value}; expected 1 or more")


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
    sizes = {"batch_size": settings.batch_size, "max_new_tokens": settings.max_new_tokens}
    examiner = Examiner(graphdef, tokenizer, mesh, **sizes)
    splits, answers = {}, {}
    for split, shown_by in zip(SPLITS, (artists, (emoji.TEST_ARTIST,)), strict=True):
        items = make_items(store, split, languages, shown_by, limit=settings.limit)
        keys, fresh = emoji.picture_keys(store, shown_by), int(split == "seen_artwork")
        pictures = _pictures(
            model, store, keys, mesh, policy, augmented=fresh, seed=seed, cache=cache
        )
        answers[split] = examiner(params, items, pictures)
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
    """Chooses answers in words for the answer sheet at random: languages in turn, each with a new thing."""
    rng = np.random.default_rng(seed)
    answers = [answer for answer in answers if answer.text is not None]
    shuffled = [answers[i] for i in rng.permutation(len(answers))]
    languages = sorted({answer.item.language for answer in answers})
    chosen, shown = [], set()
    while len(chosen) < min(count, len(shuffled)):
        language = languages[len(chosen) % len(languages)]
        fresh = (a for a in shuffled if a.item.language == language and a.item.images not in shown)
        answer = next(fresh, None)
        if answer is None:
            break
        shown.add(answer.item.images)
        chosen.append(answer)
    return [
        AnswerExample(
            picture=np.asarray(
                image.decode(
                    store.image(a.item.images[0]),
                    background=policy.background,
                    orientation=policy.orientation,
                )
            ),
            language=a.item.language,
            question=a.item.question[-1].text.replace(IMAGE_MARKER, "").strip(),
            answer=a.text,
            truth=a.item.candidates[0],
            split=a.item.split,
        )
        for a in chosen
    ]


def summarize(answers: Sequence[Answer], languages: Sequence[str]) -> dict:
    """Scores of one split, in [0, 1].

    The keys are `english`, `multilingual` (the mean over the other languages) and `languages` (each
    language). The first two are None if the split has no such language. `n` is the number of
    questions of each kind.

    Raises:
      ValueError: a language has no answers, or not as many of each kind.
    """
    by_language = {code: _scores(answers, code) for code in languages}
    others = [scores for code, scores in by_language.items() if code != "en"]
    mean = (
        {name: float(np.mean([scores[name] for scores in others])) for name in others[0]}
        if others
        else None
    )
    return {
        "english": by_language.get("en"),
        "multilingual": mean and mean | {"n": sum(scores["n"] for scores in others)},
        "languages": by_language,
    }


def _scores(answers: Sequence[Answer], language: str) -> dict[str, float]:
    """Each score of a language, and the number of questions `n`."""
    found: dict[str, list[bool]] = {}
    for answer in answers:
        if answer.item.language == language:
            for name, right in answer.right.items():
                found.setdefault(name, []).append(right)
    counts = {name: len(values) for name, values in found.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"language {language!r} has these numbers of answers: {counts}; expected as many of each kind"
        )
    means = {name: float(np.mean(values)) for name, values in sorted(found.items())}
    return means | {"n": next(iter(counts.values()))}
