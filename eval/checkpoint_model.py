"""A checkpoint of ours as a model to evaluate: batches of prompts of one shape, and log-likelihoods."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pangea_jax
from eval.models import Request, Responses, cut
from eval.task import IMAGE_MARK, Failed, Profile
from pangea_jax.generate.engine import Conversation, Engine, bucket
from pangea_jax.model import PangeaConfig

_MOST_ROWS = 64
_HOST_BYTES = 1 << 30
# Of what a device has left, for the batch; programs, logits and copies need the rest.
_SHARE = 0.4


class CheckpointModel:
    """Answers requests with `pangea_jax`; what cannot be read or does not fit fails alone.

    Prompts are put together by their shape (tokens and tiles, rounded up as the engine does), so that
    few programs are compiled and no row is padded to a much longer one. What a batch is made of changes
    a response by rounding at most: a resumed run says what an uninterrupted one says, unless rounding
    decides between two tokens.

    Args:
      name: what responses and reports call it.
      batch_size: rows at a time, or None for as many as the device has memory for.
      profile: "paper" repeats Pangea's wrapper of lmms-eval: pictures without a mark in a text that has
        marks are not shown. With "fixed" such a request fails. Elsewhere both do as that wrapper does:
        the system prompt of Qwen, and marks in front, in a line of their own, where a text has none.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        batch_size: int | None = None,
        profile: Profile = "fixed",
    ):
        self.name, self._engine, self._profile = name, engine, profile
        self._batch_size = batch_size
        # Once, with nothing but the parameters there: the same shape always has the same rows.
        self._memory = _memory()
        self._fits = _MOST_ROWS if batch_size is None else batch_size

    def generate(self, requests: Sequence[Request]) -> Responses:
        if not requests:
            return
        settings = requests[0].generation
        new = settings.max_new_tokens

        def read(request: Request):
            prompt = self._engine.read(self._conversation(request), new)
            return prompt, self._engine.shape(prompt)

        def answer(batch: Sequence[tuple[Request, Any]]) -> list[str]:
            texts = self._engine.generate(
                [prompt for _, prompt in batch],
                new,
                temperature=settings.temperature,
                seed=[seed_of(request) for request, _ in batch],
                batch_size=len(batch),
            )
            return [cut(text, settings.until) for text in texts]

        yield from self._run(requests, read, answer, bucket(new))

    def loglikelihood(self, requests: Sequence[Request]) -> Responses:
        def read(request: Request):
            item = self._engine.candidates(self._conversation(request), request.choices)
            shape, tails = self._engine.shape(item[0]), item[1].tails
            longest = max(map(len, tails))
            return item, (*shape, len(tails), 1 << (longest - 1).bit_length())

        def answer(batch: Sequence[tuple[Request, Any]]) -> list[list[float]]:
            scores = self._engine.loglikelihood([item for _, item in batch], batch_size=len(batch))
            return [[choice.total for choice in choices] for choices in scores]

        yield from self._run(requests, read, answer, 0)

    def _conversation(self, request: Request) -> Conversation | str:
        text, images = request.prompt.with_marks(), list(request.images)
        if not request.generation.chat:
            if images:
                raise ValueError("a prompt of raw text cannot have pictures")
            return text
        if self._profile == "paper" and images:
            images = images[: text.count(IMAGE_MARK)]
        return [{"role": "user", "content": text, **({"images": images} if images else {})}]

    def _run(self, requests: Iterable[Request], read: Callable, answer: Callable, new: int):
        """Reads requests, gathers them by shape and answers whatever is full, in the end what is left."""
        waiting = collections.defaultdict(list)
        for request in requests:
            try:
                item, shape = read(request)
            except (ValueError, OSError) as error:  # ImageError and FileNotFoundError among them
                yield request, Failed(str(error))
                continue
            group = waiting[shape]
            group.append((request, item))
            if len(group) >= self._rows(shape, new):
                yield from self._answer(waiting.pop(shape), answer)
        for group in self._rest(waiting, new):
            yield from self._answer(group, answer)

    def _rest(self, waiting: Mapping[tuple[int, ...], list], new: int) -> Iterator[list]:
        """Batches of what has not filled any, of shapes that differ in little: up to half of the tokens,
        or in the length of the choices. A row that is padded costs less than one more batch."""
        rest = [(shape, request) for shape, group in waiting.items() for request in group]
        rest.sort(key=lambda item: (item[0][1:3], item[0][0]), reverse=True)
        batch, largest = [], ()
        for shape, request in rest:
            grown = (*largest[:3], *map(max, largest[3:], shape[3:]))
            alike = batch and shape[1:3] == largest[1:3] and 2 * shape[0] >= largest[0]
            if alike and len(batch) < self._rows(grown, new):
                largest = grown
            else:
                if batch:
                    yield batch
                batch, largest = [], shape
            batch.append(request)
        if batch:
            yield batch

    def _answer(self, group: list[tuple[Request, Any]], answer: Callable) -> Iterator:
        """The answers of a group, in halves where it does not fit into the device's memory."""
        try:
            responses = answer(group)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if len(group) == 1:
                yield group[0][0], Failed("the device has too little memory for this one prompt")
                return
            self._fits = half = len(group) // 2
            for part in (group[:half], group[half:]):
                yield from self._answer(part, answer)
            return
        for (request, _), response in zip(group, responses, strict=True):
            yield request, response

    def _rows(self, shape: tuple[int, ...], new: int) -> int:
        if self._batch_size is not None:
            return self._fits
        tokens, tiles, *tails = shape
        choices, length = tails or (1, 0)
        bytes_each = row_bytes(self._engine.config, tokens, tiles, choices, new + length)
        rows = max(1, int(self._memory // bytes_each))
        return min(self._fits, 1 << (rows.bit_length() - 1))


def seed_of(request: Request) -> int:
    """A request's own, so that a sampled response does not depend on what else is asked, or when."""
    return int(request.document.hash[:8], 16)


def row_bytes(config: PangeaConfig, tokens: int, tiles: int, choices: int, new: int) -> int:
    """What one row of a batch takes, roughly: its cache, and the widest arrays of one layer."""
    vision, language = config.vision, config.language
    size = jnp.dtype(config.dtype).itemsize
    slots = 2 * language.layers * language.kv_heads * language.head_width * size
    cache = slots * (tokens + new) * choices
    # Attention weights are float32; the decoder's are made for 512 queries at a time at most.
    decoder = tokens * (4 * size * language.mlp + 4 * language.heads * min(tokens, 512))
    seen = vision.patches + 1
    tower = tiles * seen * (4 * vision.heads * seen + 4 * size * vision.mlp)
    logits = 4 * language.vocab_size * (1 + choices * new if choices > 1 else 1)
    return cache + decoder + tower + logits


def _memory() -> float:
    """Bytes that a batch may take on the first device."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return _HOST_BYTES
    return _SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def open_checkpoint(name: str, *, batch_size: str | int, profile: Profile) -> CheckpointModel:
    """The model that `pangea_jax.load` has under this name.

    Raises:
      ValueError, OSError: the batch size is no positive number and not "auto", or there is no such model.
    """
    if batch_size != "auto" and not (str(batch_size).isdecimal() and int(batch_size) > 0):
        raise ValueError(f"--batch_size={batch_size}: expected auto or a positive number")
    rows = None if batch_size == "auto" else int(batch_size)
    return CheckpointModel(pangea_jax.load(name), name, batch_size=rows, profile=profile)
