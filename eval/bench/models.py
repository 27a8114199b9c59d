"""Models to evaluate: an endpoint, or a file of responses. Our checkpoints are in checkpoint_model.py."""

import base64
import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from eval.bench import documents
from eval.bench.endpoint import Endpoint
from eval.bench.task import IMAGE_MARK, Document, Failed, Generation, Prompt, Task, digest
from pangea_jax.data import image

Responses = Iterator[tuple["Request", Any]]


@dataclasses.dataclass(frozen=True)
class Request:
    """One document as a question to a model.

    Attributes:
      images: paths of the pictures, in the order of the `<image>` marks of `prompt.with_marks()`.
      choices: the continuations to compute log-likelihoods of; empty for generation.
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
        """Equal for two requests with the same document, prompt and generation settings."""
        return self.document.hash, self.prompt_hash, self.generation_hash


class Model(Protocol):
    """Answers requests in any order and yields each answer as soon as it is done.

    Both methods get requests with the same `generation`, the longest prompts first, and yield `(request, response)`.
    The response is `Failed` if the model cannot answer the request; this must not affect the other requests.
    """

    name: str

    def generate(self, requests: Sequence[Request]) -> Responses:
        """Yields texts, cut at `generation.until`."""

    def loglikelihood(self, requests: Sequence[Request]) -> Responses:
        """Yields, for each request, the summed log-likelihood of each of its choices after the prompt."""


class ResponseFile:
    """Responses made elsewhere: JSON lines with `task`, `doc_id` and `response` (a list for log-likelihood tasks)."""

    def __init__(self, path: Path):
        self.name, self.path = path.stem, path
        self._responses = documents.read_answers(path, "response")
        self._used: set[tuple[str, str]] = set()

    def generate(self, requests: Sequence[Request]) -> Responses:
        for request, response in self.loglikelihood(requests):
            if not isinstance(response, str | Failed):
                kind = type(response).__name__
                response = Failed(f"the response in {self.path.name} is {kind}, not a text")
            yield request, response

    def loglikelihood(self, requests: Sequence[Request]) -> Responses:
        missing = Failed(f"no response in {self.path.name}")
        for request in requests:
            key = request.task.name, request.document.id
            self._used.add(key)
            yield request, self._responses.get(key, missing)

    @property
    def unused(self) -> list[tuple[str, str]]:
        """(task, document) of the responses that no request has used."""
        return sorted(set(self._responses) - self._used)


class EndpointModel:
    """A chat model behind an OpenAI-compatible endpoint."""

    def __init__(self, endpoint: Endpoint):
        self.name, self._endpoint = endpoint.model, endpoint

    def generate(self, requests: Sequence[Request]) -> Responses:
        yield from self._endpoint.map(requests, self._ask)

    def loglikelihood(self, requests: Sequence[Request]) -> Responses:
        reason = (
            "chat endpoints give no log-likelihood of a given text; run this task with a checkpoint"
        )
        for request in requests:
            yield request, Failed(reason)

    def _ask(self, request: Request) -> str | Failed:
        try:
            content = list(_content(request))
        except (image.ImageError, OSError) as error:
            return Failed(str(error))
        wanted = request.generation
        settings = {"max_tokens": wanted.max_new_tokens, "temperature": wanted.temperature}
        if wanted.until:
            # Endpoints take at most four stop strings; `cut` applies the others.
            settings["stop"] = list(wanted.until[:4])
        reply = self._endpoint.chat([{"role": "user", "content": content}], **settings)
        return reply if isinstance(reply, Failed) else cut(reply, wanted.until)


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first stop string."""
    places = [text.find(stop) for stop in until if stop in text]
    return text[: min(places)] if places else text


def _content(request: Request) -> Iterator[dict]:
    """The parts of an OpenAI message, with the pictures in the places of their marks."""
    pieces = request.prompt.with_marks().split(IMAGE_MARK)
    images = list(request.images)
    for index, piece in enumerate(pieces):
        if index and images:
            yield {"type": "image_url", "image_url": {"url": _data_url(images.pop(0))}}
        if piece.strip():
            yield {"type": "text", "text": piece}


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _data_url(path: Path) -> str:
    """The file itself if it is a JPEG, else the picture as PNG."""
    encoded, kind = path.read_bytes(), "jpeg"
    picture = image.decode(encoded, name=str(path))
    if not encoded.startswith(b"\xff\xd8"):
        encoded, kind = png(picture), "png"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
