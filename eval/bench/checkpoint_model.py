"""Our checkpoints as models to evaluate: puts their requests into batches that fit into memory."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Literal

import jax

import pangea_jax
from eval.bench.models import Request, Responses
from eval.bench.responses import Crew
from eval.bench.task import IMAGE_MARK, Failed, Generation, Profile
from pangea_jax import sharding
from pangea_jax.generate import fit
from pangea_jax.generate.decode import Sampling
from pangea_jax.generate.engine import Conversation, Engine, bucket, choose_mesh
from pangea_jax.generate.prompt import Prompt
from pangea_jax.work import distributed

_MOST_ROWS = 64
_READERS = 4
_HOST_BYTES = 1 << 30
_TOO_LITTLE = "the device has too little memory for this one prompt"


class CheckpointModel:
    """Answers requests with `pangea_jax`. If a request cannot be read or does not fit, only this request fails.

    `Engine.serve` makes the texts: when an answer ends, its row takes the next request, and only the first question
    about a picture reads the picture. Log-likelihoods run in batches of one shape (tokens and tiles, rounded up as in
    the engine), so few programs are compiled and there is little padding. The other requests of a batch change a
    response by rounding only.

    Args:
      name: the name in responses and reports.
      batch_size: rows in a batch, or None for as many as the memory holds.
      profile: what to do if a text has marks, but fewer than pictures. "paper" leaves out the other pictures, as
        Pangea's wrapper of lmms-eval does; with "fixed" the request fails.
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
        mesh = engine.mesh
        self._shards = sharding.row_shards(mesh)
        self._tensor = 1 if mesh is None else mesh.shape["tensor"]
        # Measured once, with only the parameters loaded, so that a shape always gets the same rows.
        self._memory = _memory()
        self._fits = _MOST_ROWS * self._shards if batch_size is None else batch_size

    def generate(self, requests: Sequence[Request]) -> Responses:
        if not requests:
            return
        settings = requests[0].generation

        def read(request: Request) -> Prompt | Failed:
            try:
                return self._engine.read(self._conversation(request), settings.max_new_tokens)
            except (ValueError, OSError) as error:  # ImageError and FileNotFoundError among them
                return Failed(str(error))

        with _ReadAhead(requests, read, self._fits) as ahead:
            while shapes := ahead.shapes(self._engine.shape):
                yield from self._serve(ahead, shapes, settings)
            yield from ahead.failures()

    def _serve(self, ahead: "_ReadAhead", shapes: Sequence[tuple[int, int]], settings: Generation):
        """Answers the next prompts that have between half and all of the tokens of the longest of `shapes`.

        If the memory is too small, the unanswered prompts go back, for a batch with fewer rows.
        """
        width, tiles = (max(sizes) for sizes in zip(*shapes, strict=True))
        new = settings.max_new_tokens
        # An empty row costs as much as a full one.
        alike = sum(width <= 2 * tokens for tokens, _ in shapes)
        rows = min(self._rows_of_answers(width, tiles, bucket(new)), alike)
        asked: dict[int, tuple[Request, Prompt]] = {}

        def tokens(prompt: Prompt) -> int:
            return self._engine.shape(prompt)[0]

        def feed() -> Iterator[tuple[Prompt, Sampling]]:
            for number, (request, prompt) in enumerate(ahead.take(tokens, width)):
                asked[number] = request, prompt
                seed = seed_of(request)
                yield prompt, Sampling.make(1, temperature=settings.temperature, seed=seed)

        options = {"rows": rows, "width": width, "stop_strings": settings.until}
        try:
            for number, text in self._engine.serve(feed(), new, **options):
                yield asked.pop(number)[0], text
                yield from ahead.failures()
            return
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        # After the except block: the error keeps the batch's arrays on the device.
        ahead.put_back(asked.values())
        if rows > self._shards:
            self._fits = max(self._shards, rows // 2)
        elif (rows, width) != (1, shapes[0][0]):
            # Each device has one row already. Another prompt's length may be the cause, so try the first alone.
            yield from self._serve(ahead, shapes[:1], settings)
        else:
            request, _ = next(ahead.take(tokens, width))
            yield request, Failed(_TOO_LITTLE)

    def loglikelihood(self, requests: Sequence[Request]) -> Responses:
        """Gathers prompts by shape and answers each full batch, then the rest."""
        waiting = collections.defaultdict(list)
        for request in requests:
            try:
                item = self._engine.candidates(self._conversation(request), request.choices)
            except (ValueError, OSError) as error:  # ImageError and FileNotFoundError among them
                yield request, Failed(str(error))
                continue
            tails = item[1].tails
            longest = max(map(len, tails))
            shape = *self._engine.shape(item[0]), len(tails), 1 << (longest - 1).bit_length()
            group = waiting[shape]
            group.append((request, item))
            if len(group) >= self._rows(shape):
                yield from self._score(waiting.pop(shape))
        for group in self._rest(waiting):
            yield from self._score(group)

    def _conversation(self, request: Request) -> Conversation | str:
        text, images = request.prompt.with_marks(), list(request.images)
        if not request.generation.chat:
            if images:
                raise ValueError("a prompt of raw text cannot have pictures")
            return text
        if self._profile == "paper" and images:
            images = images[: text.count(IMAGE_MARK)]
        return [{"role": "user", "content": text, **({"images": images} if images else {})}]

    def _rest(self, waiting: Mapping[tuple[int, ...], list]) -> Iterator[list]:
        """Batches of the rest: prompts with at least half of the longest one's tokens, and choices of any length.
        Padding a row costs less than one more batch."""
        rest = [(shape, request) for shape, group in waiting.items() for request in group]
        rest.sort(key=lambda item: (item[0][1:3], item[0][0]), reverse=True)
        batch, largest = [], ()
        for shape, request in rest:
            grown = (*largest[:3], *map(max, largest[3:], shape[3:]))
            alike = batch and shape[1:3] == largest[1:3] and 2 * shape[0] >= largest[0]
            if alike and len(batch) < self._rows(grown):
                largest = grown
            else:
                if batch:
                    yield batch
                batch, largest = [], shape
            batch.append(request)
        if batch:
            yield batch

    def _score(self, group: list[tuple[Request, Any]]) -> Responses:
        """The log-likelihoods of a batch, in halves if it does not fit into the device's memory."""
        items = [item for _, item in group]
        try:
            scores = self._engine.loglikelihood(items, batch_size=len(items))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if len(group) == 1:
                yield group[0][0], Failed(_TOO_LITTLE)
                return
            half = len(group) // 2
            self._fits = max(half, min(self._fits, self._shards))
            for part in (group[:half], group[half:]):
                yield from self._score(part)
            return
        for (request, _), choices in zip(group, scores, strict=True):
            yield request, [choice.total for choice in choices]

    def _rows(self, shape: tuple[int, ...]) -> int:
        """Rows for log-likelihoods of a shape: tokens, tiles, choices, length of a choice."""
        return self._rounded(int(self._memory // fit.row_bytes(self._engine.config, *shape)))

    def _rows_of_answers(self, width: int, tiles: int, new: int) -> int:
        sizes = self._engine.config, self._memory, width, tiles, width + new, self._tensor
        return self._rounded(fit.rows_of_answers(*sizes))

    def _rounded(self, rows: int) -> int:
        """The rows that fit into each shard's memory, rounded down to a power of two, times the shards."""
        if self._batch_size is not None:
            return self._fits
        return min(self._fits, self._shards << (max(1, rows).bit_length() - 1))


class _ReadAhead:
    """Turns requests into prompts, in order; threads read ahead, because decoding pictures is slow."""

    def __init__(self, requests: Iterable[Request], read: Callable, depth: int):
        self._requests, self._read, self._depth = iter(requests), read, depth
        self._threads = futures.ThreadPoolExecutor(_READERS)
        self._ready: collections.deque[tuple[Request, futures.Future]] = collections.deque()
        self._failed: list[tuple[Request, Failed]] = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._threads.shutdown(cancel_futures=True)

    def shapes(self, shape: Callable) -> list[tuple[int, int]]:
        """The shapes of the waiting prompts that have between half and twice the tokens of the first."""
        found = []
        prompts = itertools.takewhile(lambda p: p is not None, map(self._at, range(self._depth)))
        for size in map(shape, prompts):
            if not found or found[0][0] <= 2 * size[0] <= 4 * found[0][0]:
                found.append(size)
        return found

    def take(self, tokens: Callable, width: int) -> Iterator[tuple[Request, Prompt]]:
        """The next prompts with between `width` / 2 and `width` tokens, until the waiting others fill all places."""
        place = 0
        while (prompt := self._at(place)) is not None:
            if width <= 2 * tokens(prompt) <= 2 * width:
                request, _ = self._ready[place]
                del self._ready[place]
                yield request, prompt
            else:
                place += 1

    def put_back(self, items: Iterable[tuple[Request, Prompt]]) -> None:
        done = [(request, futures.Future()) for request, _ in items]
        for (_, future), (_, prompt) in zip(done, items, strict=True):
            future.set_result(prompt)
        self._ready.extendleft(reversed(done))

    def failures(self) -> Iterator[tuple[Request, Failed]]:
        """The requests that could not be read, each once."""
        while self._failed:
            yield self._failed.pop()

    def _at(self, place: int) -> Prompt | None:
        """The prompt with `place` others before it, or None."""
        while True:
            # After put_back, more prompts may be ready than are ever read ahead.
            missing = max(0, self._depth - len(self._ready))
            for request in itertools.islice(self._requests, missing):
                self._ready.append((request, self._threads.submit(self._read, request)))
            if place >= len(self._ready):
                return None
            request, future = self._ready[place]
            if not isinstance(prompt := future.result(), Failed):
                return prompt
            self._failed.append((request, prompt))
            del self._ready[place]


def seed_of(request: Request) -> int:
    """A seed from the document, so that a sampled response does not depend on the other requests."""
    return int(request.document.hash[:8], 16)


def _memory() -> float:
    """The bytes that a batch may use on the first device."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return _HOST_BYTES
    return fit.SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def crew(sync: Callable[[], Any]) -> Crew:
    """The processes of this job, each with a model of its own on its own devices."""
    return Crew(jax.process_index(), jax.process_count(), distributed.gather, sync)


def open_checkpoint(
    name: str,
    *,
    batch_size: str | int,
    profile: Profile,
    mesh: str = "auto",
    base: str | None = None,
    weights: str | None = None,
    engine: Engine | None = None,
) -> CheckpointModel:
    """The model that `pangea_jax.load` has under this name.

    Args:
      batch_size: "auto" or a number.
      mesh: the devices of this process: "auto", or sizes of axes as in `data=2,tensor=4`.
      base: the model below adapters, see `pangea_jax.load`.
      weights: their form in 8 or 4 bits, see `pangea_jax.load`.
      engine: the model, if it is loaded already.

    Raises:
      ValueError, OSError: a setting is wrong, or the model does not exist.
    """
    if batch_size != "auto" and not (str(batch_size).isdecimal() and int(batch_size) > 0):
        raise ValueError(f"--batch_size={batch_size}: expected auto or a positive number")
    rows = None if batch_size == "auto" else int(batch_size)
    engine = engine or pangea_jax.load(name, base=base, weights=weights, mesh=_parse_mesh(mesh))
    # Responses are kept under this name, so adapters on two bases are two models, and so are two forms of weights.
    known = f"{name} on {base}" if base else name
    known += f" in {weights}" if weights else ""
    return CheckpointModel(engine, known, batch_size=rows, profile=profile)


def _parse_mesh(text: str) -> jax.sharding.Mesh | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"--mesh={text}: expected auto, or sizes as in data=2,tensor=4") from None
    return choose_mesh(sizes, devices=jax.local_devices())
