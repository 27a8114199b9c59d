"""Asks a model the questions of the sample's evaluation, each with its own pictures and image-blind."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pangea_jax.batch import Batch, Example
from pangea_jax.data.chat import Rendered
from pangea_jax.data.reader import CachedFeatures, Reader, Tiles
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.generate import likelihood
from pangea_jax.generate.decode import complete, last_hidden, until
from pangea_jax.generate.likelihood import Candidates, pad_candidates
from pangea_jax.model import params as model_params
from pangea_jax.sample.scores import BLIND, same_text
from pangea_jax.sample.tasks import NAMED, Item
from pangea_jax.sharding import BATCH_SPEC

PROMPT_STEP = 16  # prompts are padded to a multiple of this, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Answer:
    """The model's answer to an item.

    Attributes:
      right: score -> whether it is right, with the item's own pictures and blind.
      text: the greedy answer with its own pictures; None if the item is not answered in words.
    """

    item: Item
    right: Mapping[str, bool]
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """An item with the pictures to show, and its words as the model reads them."""

    item: Item
    images: tuple[str, ...]
    words: Rendered


class Examiner:
    """Asks a model. Compiles one function per shape; rows are split over the mesh."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        *,
        batch_size: int,
        max_new_tokens: int,
    ):
        self._tokenizer = tokenizer
        self._batch_size = batch_size + -batch_size % mesh.size
        self._rows = NamedSharding(mesh, BATCH_SPEC)
        settings = {"max_new_tokens": max_new_tokens, "stop_id": tokenizer.im_end_id}
        compiled = functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
        self._name = compiled(functools.partial(_name, graphdef, **settings))
        self._choose = compiled(functools.partial(_choose, graphdef))

    def __call__(
        self, params: Mapping[str, Array], items: Sequence[Item], pictures: Tiles | CachedFeatures
    ) -> list[Answer]:
        """Answers every item, with its own pictures and blind. With features, pictures are shown as their view 0."""
        reader = Reader(self._tokenizer, pictures)
        answers: dict[int, Answer] = {}
        for metric in dict.fromkeys(item.metric for item in items):
            places = [i for i, item in enumerate(items) if item.metric == metric]
            asked = self._ask(params, [items[i] for i in places], reader)
            answers |= dict(zip(places, asked, strict=True))
        return [answers[i] for i in range(len(items))]

    def _ask(self, params, items: Sequence[Item], reader: Reader) -> list[Answer]:
        """Answers items of one kind."""
        seen = [self._prompt(item, item.images, reader) for item in items]
        blind = [self._prompt(item, item.blind_images, reader) for item in items]
        longest = max(len(prompt.words.tokens) for prompt in (*seen, *blind))
        width = longest + -longest % PROMPT_STEP
        order = sorted(range(len(items)), key=lambda i: self._longest_candidate(items[i]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(items), self._batch_size):
            places = order[start : start + self._batch_size]
            own, other = (
                self._run(params, [prompts[i] for i in places], width, reader)
                for prompts in (seen, blind)
            )
            for i, (right, text), (blindly, _) in zip(places, own, other, strict=True):
                right |= {BLIND + metric: value for metric, value in blindly.items()}
                answers[i] = Answer(items[i], right, text)
        return [answers[i] for i in range(len(items))]

    def _run(self, params, prompts, width, reader) -> list[tuple[dict[str, bool], str | None]]:
        """(what is right, greedy text) of each prompt; all are of one kind."""
        padded = [*prompts, *[prompts[-1]] * (self._batch_size - len(prompts))]
        rows = [[self._example(prompt, reader)] for prompt in padded]
        tiles = max(len(example.pictures) for (example,) in rows)
        batch = Batch.fill(rows, width, tiles, reader.pictures.patches)
        place = lambda x: jax.device_put(x, self._rows)  # noqa: E731
        tails, scored = map(place, self._candidates(padded))
        batch = jax.tree.map(place, batch)
        items, metric = [prompt.item for prompt in prompts], prompts[0].item.metric
        if metric != NAMED:
            scores = jax.device_get(self._choose(params, batch, tails, scored))
            return [({metric: is_first(row)}, None) for row in scores[: len(items)]]
        tokens, scores = jax.device_get(self._name(params, batch, tails, scored))
        answers = []
        for item, ids, row in zip(items, tokens, scores, strict=False):
            text = self._tokenizer.decode(until(ids.tolist(), [self._tokenizer.im_end_id]))
            exact = same_text(text, item.candidates[0])
            answers.append(({"exact_match": exact, metric: is_first(row)}, text))
        return answers

    def _prompt(self, item: Item, images: tuple[str, ...], reader: Reader) -> _Prompt:
        places = [reader.pictures.stored_place(key, len(images) > 1) for key in images]
        return _Prompt(item, images, reader.words(item.question, places, answer_next=True))

    def _example(self, prompt: _Prompt, reader: Reader) -> Example:
        keys, words = prompt.images, prompt.words
        looks = [reader.pictures.stored(key, len(keys) > 1) for key in keys]
        pictures = {reader.pictures.field: reader.cut(looks)}
        return Example(words.tokens, words.image_index, **pictures)

    @functools.cache  # noqa: B019 - lives as long as the run
    def _encode(self, text: str) -> tuple[int, ...]:
        return (*self._tokenizer.encode(text), self._tokenizer.im_end_id)

    def _longest_candidate(self, item: Item) -> int:
        return max(len(self._encode(text)) for text in item.candidates)

    def _candidates(self, prompts: Sequence[_Prompt]):
        """Tokens of the candidates and which are scored, [batch, J, A] both, see `pad_candidates`."""
        return pad_candidates(
            [
                Candidates(len(p.words.tokens), tuple(map(self._encode, p.item.candidates)), 0)
                for p in prompts
            ]
        )


def is_first(scores: Float[Array, " J"]) -> bool:
    """Whether the first candidate is likelier than all others; a tie is no success."""
    return bool(scores[0] > scores[1:].max())


def _name(
    graphdef: nnx.GraphDef,
    params: Mapping[str, Array],
    batch: Batch,
    tails: Int[Array, "B J A"],
    scored: Bool[Array, "B J A"],
    *,
    max_new_tokens: int,
    stop_id: int,
) -> tuple[Int[Array, "B M"], Float[Array, "B J"]]:
    """Greedy tokens, and the log-likelihood of every candidate with its end token.

    The model reads the prompt once. The answer and all J candidates of a row start from its cache.
    """
    model = _model(graphdef, params)
    room = batch.tokens.shape[1] + max(max_new_tokens, tails.shape[-1])
    hidden, cache = model.prefill(batch, room)
    last, lengths = last_hidden(hidden, batch.segment_ids)
    settings = {"max_new_tokens": max_new_tokens, "stop_ids": jnp.array([stop_id])}
    tokens = complete(model, last, lengths, cache, **settings)
    return tokens, likelihood.score_tails(model, last, lengths, cache, tails, scored)[0]


def _choose(
    graphdef: nnx.GraphDef,
    params: Mapping[str, Array],
    batch: Batch,
    tails: Int[Array, "B J A"],
    scored: Bool[Array, "B J A"],
) -> Float[Array, "B J"]:
    """The log-likelihood of every candidate with its end token."""
    return likelihood.score(_model(graphdef, params), batch, tails, scored)[0]


def _model(graphdef, params):
    model = model_params.merge(graphdef, params)
    if jax.default_backend() == "cpu":
        model.language.unstack()
    return model
