"""What is evaluated: anything that answers requests. An endpoint, a file of responses, a checkpoint of ours."""

import base64
import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from eval.bench import documents
from eval.bench.endpoint import Endpoint
from eval.bench.task import IMAGE_MARK, Document, Failed, Generation, Prompt, Task, digest
from pangea_jax.data import image

Responses = Iterator[tuple["Request", Any]]


@dataclasses.dataclass(frozen=True)
class Request:
    """One document put to a model.

    Attributes:
      images: paths of the pictures, in the order of the `<image>` marks of `prompt.with_marks()`.
      choices: the continuations whose log-likelihoods are asked for; empty for generation.
    """

    task: Task
    document: Document
    prompt: Prompt
    generation: Generation
    images: tuple[Path, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def prompt_hash(self) -> str:
        return digest([self.prompt.text, self.prompt.images, self.choices])

    @property
    def generation_hash(self) -> str:
        return digest(dataclasses.asdict(self.generation))

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two requests the same: document, prompt and generation settings."""
        return self.document.hash, self.prompt_hash, self.generation_hash


class Model(Protocol):
    """Answers requests, each as soon as it is done and in any order.

    Both methods get requests with the same `generation`, the longest prompts first, and yield `(request, response)`.
    A request that cannot be answered yields `Failed`; the others must not suffer from it.
    """

    name: str

    def generate(self, requests: Sequence[Request]) -> Responses:
        """Yields texts, cut at `generation.until`."""

    def loglikelihood(self, requests: Sequence[Request]) -> Responses:
        """Yields, for each request, the summed log-likelihood of each of its choices after the prompt."""


class ResponseFile:
    """Responses made elsewhere: lines with `task`, `doc_id` and `response` (a list for log-likelihood tasks)."""

    def __init__(self, path: Path):
        self.name, self.path = path.stem, path
        self._responses = documents.read_answers(path, "response")
        self._used: set[tuple[str, str]] = set()

    def generate(self, requests: Sequence[Request]) -> Responses:
        for request in requests:
            key = request.task.name, request.document.id
            self._used.add(key)
            if key not in self._responses:
                yield request, Failed(f"no response in {self.path.name}")
            elif not isinstance(self._responses[key], str):
                kind = type(self._responses[key]).__name__
                yield request, Failed(f"the response in {self.path.name} is {kind}, not a text")
            else:
                yield request, self._responses[key]

    def loglikelihood(self, requests: Sequence[Request]) -> Responses:
        for request in requests:
            key = request.task.name, request.document.id
            self._used.add(key)
            missing = Failed(f"no response in {self.path.name}")
            yield request, self._responses.get(key, missing)

    @property
    def unused(self) -> list[tuple[str, str]]:
        """(task, document) of the responses that nobody asked for."""
        return sorted(set(self._responses) - self._used)


class EndpointModel:
    """A chat model behind an OpenAI-compatible endpoint."""

    def __init__(self, endpoint: Endpoint):
        self.name, self._endpoint = endpoint.model, endpoint

    def generate(self, requests: Sequence[Request]) -> Responses:
        yield from self._endpoint.map(requests, self._ask)

    def loglikelihood(self, requests: Sequence[Request]) -> Responses:
        reason = Failed(
            "chat endpoints give no log-likelihood of a given text; run this task with a checkpoint"
        )
        for request in requests:
            yield request, reason

    def _ask(self, request: Request) -> str | Failed:
        try:
            content = list(_content(request))
        except (image.ImageError, OSError) as error:
            return Failed(str(error))
        settings = request.generation
        # Endpoints take at most four stop strings; what they leave is cut here.
        reply = self._endpoint.chat(
            [{"role": "user", "content": content}],
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            **({"stop": list(settings.until[:4])} if settings.until else {}),
        )
        return reply if isinstance(reply, Failed) else cut(reply, settings.until)


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first stop string."""
    places = [text.find(stop) for stop in until if stop in text]
    return text[: min(places)] if places else text


def _content(request: Request) -> Iterator[dict]:
    """The parts of an OpenAI message: pictures where their marks are."""
    pieces = request.prompt.with_marks().split(IMAGE_MARK)
    images = list(request.images)
    for index, piece in enumerate(pieces):
        if index and images:
            yield {"type": "image_url", "image_url": {"url": _data_url(images.pop(0))}}
        if piece.strip():
            yield {"type": "text", "text": piece}


def _data_url(path: Path) -> str:
    """The picture as PNG or, where it is one already, the bytes of a JPEG."""
    encoded, kind = path.read_bytes(), "jpeg"
    picture = image.decode(encoded, name=str(path))
    if not encoded.startswith(b"\xff\xd8"):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        encoded, kind = buffer.getvalue(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
