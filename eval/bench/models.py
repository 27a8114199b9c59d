"""Models to evaluate: an endpoint, or a file of responses. Our checkpoints are in checkpoint_model.py."""

import base64
import dataclasses
import io
import math
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


_PROBE = "Nairobi is the capital of Kenya."


def left_out(model: Model, requests: Sequence[Request]) -> dict[str, str]:
    """Why the model cannot do some of the tasks, by their names."""
    return model.unable(requests) if isinstance(model, EndpointModel) else {}


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint: chats, and log-likelihoods if it echoes a text's tokens."""

    def __init__(self, endpoint: Endpoint):
        self.name, self._endpoint = endpoint.model, endpoint

    def generate(self, requests: Sequence[Request]) -> Responses:
        yield from self._endpoint.map(requests, self._ask)

    def loglikelihood(self, requests: Sequence[Request]) -> Responses:
        yield from self._endpoint.map(requests, self._score)

    def unable(self, requests: Sequence[Request]) -> dict[str, str]:
        """Why it cannot do some tasks, by their names; asks one short question if any needs log-likelihoods.

        Raises:
          ConnectionError: the endpoint does not answer.
        """
        needed = {r.task.name: r.generation.chat for r in requests if r.choices}
        if not needed:
            return {}
        probe = self._endpoint.echo(_PROBE)
        if not isinstance(probe, Failed) and len(probe) < 2:
            probe = Failed(f"endpoint: it gives {len(probe)} log-probability for a whole sentence")
        if isinstance(probe, Failed):
            if "APIConnectionError" in probe.reason or "APITimeoutError" in probe.reason:
                raise ConnectionError(f"no answer from {self.name}: {probe.reason}")
            reason = (
                "it needs log-likelihoods, and this endpoint gives none: /v1/completions with echo and logprobs failed "
                f"({probe.reason}). Run this task with a checkpoint, or behind vLLM"
            )
            return dict.fromkeys(needed, reason)
        pictures = "an endpoint gives no log-likelihoods after a chat or a picture; run it with a checkpoint"
        return {name: pictures for name, chat in needed.items() if chat}

    def _score(self, request: Request) -> list[float] | Failed:
        """The log-likelihood of each choice, of the same tokens as in `Engine.candidates`.

        As in lm-eval, a choice starts at token n of the whole text if the prompt alone has n tokens, also if the first
        letters of the choice change the prompt's last token.
        """
        prompt = request.prompt.text
        before = self._endpoint.echo(prompt)
        if isinstance(before, Failed):
            return before
        totals = []
        for choice in request.choices:
            whole = self._endpoint.echo(prompt + choice)
            if isinstance(whole, Failed):
                return whole
            own = whole[len(before) :]
            if not own:
                return Failed(f"choice {choice!r:.60} has no tokens after the prompt")
            totals.append(math.fsum(own))
        return totals

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
