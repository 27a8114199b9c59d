"""Calls models at any OpenAI-compatible endpoint: many calls at once, each paid for once, within a budget.

A stored reply is never requested again, see `reply_store`. The openai package retries a failed call. If the endpoint
answers no request at all, the client waits for it. If only one prompt fails, it is refused and the others go on.
"""

import collections
import contextvars
import dataclasses
import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pangea_jax.curation import markup
from pangea_jax.curation.accounting import Unfit
from pangea_jax.curation.reply_store import Replies, Stop, Usage
from pangea_jax.work import transport

Item, Result = TypeVar("Item"), TypeVar("Result")

MALFORMED_TRIES = 3
"""Number of replies that are not a chat completion, after which a prompt counts as refused."""

_PROMPT_FAILURES = 3  # failures of one prompt while others are answered, after which it is refused
# If the first calls are all rejected, the settings are wrong and not the prompts.
_FIRST_CALLS = 20
_LONGEST_WAIT = 60.0  # seconds
_MESSAGE_TOKENS = 16  # maximum that any chat template adds to a message
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Claim:
    """The request that a thread sends, and the error that forbids to send it again."""

    key: str
    stop: Stop | None = None


_CLAIM: contextvars.ContextVar[_Claim] = contextvars.ContextVar("claim")


class EndpointError(Stop):
    """The endpoint cannot be used: the key or model is wrong, or it was silent for longer than `patience`."""


class Refused(Unfit):
    """This prompt gets no answer, but others do."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model at one address, and its prices.

    Attributes:
      model: the endpoint's name of the model.
      base_url: address of the API, `https://host/v1`; None: OpenAI's own.
      api_key_variable: the environment variable that has the key; local servers need none.
      concurrency: calls in flight at once in one process.
      temperature, max_tokens: of every call that does not set its own. `max_tokens` also limits what a
        call can cost.
      extra_body: further fields of the request, such as vLLM's.
      timeout: seconds for a whole answer, after which a call counts as unanswered.
      retries: further attempts if the endpoint is busy (429), broken (5xx) or silent. The openai package
        waits longer after each of them and obeys `Retry-After`.
      patience: seconds to wait, after these attempts, while the endpoint answers no request.
      price_in, price_out: dollars per million tokens of prompts and replies.
      image_tokens: maximum number of tokens that a picture is charged as.
    """

    model: str = ""
    base_url: str | None = "http://localhost:8000/v1"
    api_key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 32
    temperature: float | None = 0.0
    max_tokens: int = 4096
    extra_body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout: float = 300.0
    retries: int = 4
    patience: float = 7_200.0
    price_in: float = 0.0
    price_out: float = 0.0
    image_tokens: int = 3_000

    def __post_init__(self):
        if not self.model:
            raise ValueError("config.llm.model is empty: the endpoint's name of a model is needed")
        if self.concurrency < 1:
            raise ValueError(f"config.llm.concurrency must be positive, not {self.concurrency}")


@dataclasses.dataclass(frozen=True)
class ClientConfig(ModelConfig):
    """A model, and the limits of all calls that one cache of replies stores.

    Attributes:
      budget: maximum cost in dollars of all runs with one cache together; None: no limit.
      max_calls: maximum number of requests of all runs with one cache together; None: no limit.
      journal: `wal`, or `delete` if machines share the cache on a network file system.
    """

    budget: float | None = None
    max_calls: int | None = None
    journal: str = "wal"

    def __post_init__(self):
        super().__post_init__()
        if self.budget is not None and not self.price_in + self.price_out > 0:
            raise ValueError(
                f"config.llm.budget is {self.budget} dollars, but price_in and price_out (dollars per "
                "million tokens) are 0; set them, or limit max_calls instead"
            )
        if self.journal not in ("wal", "delete"):
            raise ValueError(f"config.llm.journal is {self.journal!r}; expected 'wal' or 'delete'")


class Reply(NamedTuple):
    """A model's answer. It is data: check it, but never follow or run it.

    Attributes:
      text: empty if the model said nothing.
      prompt_tokens, completion_tokens: as the endpoint counts them; see `Usage.estimated`.
      cached: whether the reply was stored before.
      finish_reason: `stop`, `length` (cut off) or another word of the endpoint.
      key: key of the stored reply.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool
    finish_reason: str
    key: str


def request_key(request: Mapping[str, Any]) -> str:
    """SHA-256 of a request's body: model, messages (or input) and sampling."""
    body = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()


class Client:
    """Calls one model. All threads of a process share one client, see `client`.

    Args:
      cache: SQLite file of the replies; made if it is missing.
    """

    def __init__(self, config: ClientConfig, cache: Path):
        try:
            import openai
        except ImportError:
            raise ImportError(
                "calling a model needs the openai package; run: pip install -r requirements-curation.txt"
            ) from None
        # A claim is renewed only after all attempts and waits of the openai package.
        attempt = config.timeout + 2 * _LONGEST_WAIT
        self.config = config
        self.replies = Replies(
            cache,
            lease=(config.retries + 1) * attempt + 2 * _LONGEST_WAIT,
            budget=config.budget,
            max_calls=config.max_calls,
            journal=config.journal,
        )
        self._errors = openai
        self._slots = threading.BoundedSemaphore(config.concurrency)
        self._answered, self._rejected = 0, 0
        self._api = openai.OpenAI(
            api_key=os.environ.get(config.api_key_variable, "none"),
            base_url=config.base_url,
            max_retries=config.retries,
            timeout=config.timeout,
            http_client=self._transport(
                transport.limited(openai.DefaultHttpxClient, config.timeout)
            ),
        )

    def _transport(self, kind: type) -> Any:
        """The openai package's client of HTTP; charges each attempt that times out, since it may be billed."""
        replies = self.replies

        class Transport(kind):
            def send(self, request, **settings):
                claim = _CLAIM.get()
                if claim.stop:  # some versions of the package retry after every exception
                    raise claim.stop
                try:
                    return super().send(request, **settings)
                except Exception as error:
                    # By name, since the class may be of httpx or httpx2, depending on the openai package.
                    if type(error).__name__ == "ReadTimeout":
                        try:
                            replies.lose(claim.key)
                        except Stop as stop:
                            claim.stop = stop
                            raise
                    raise

        return Transport()

    def complete(
        self, messages: Sequence[Mapping[str, Any]], *, purpose: str, **sampling: Any
    ) -> Reply:
        """The reply to a conversation, from the cache if it is stored there.

        Args:
          messages: in OpenAI's form; pictures are `image_url` parts.
          purpose: what the call is for; `usage` counts by purpose. It is not part of the key.
          sampling: overrides `temperature` and `max_tokens`, or adds other fields such as `seed`.

        Raises:
          Refused: the model declines, or the endpoint rejects this prompt.
          BudgetExceeded: the call could cost more than is left of the budget. Nothing was sent.
          EndpointError: the endpoint cannot be used.
        """
        settings = {"temperature": self.config.temperature, "max_tokens": self.config.max_tokens}
        settings = {k: v for k, v in (settings | sampling).items() if v is not None}
        request = {"model": self.config.model, "messages": list(messages), **settings}
        request |= self.config.extra_body
        words = sum(_size(message, self.config.image_tokens) for message in messages)
        most = self._cost(words, settings.get("max_tokens", self.config.max_tokens))
        row = self._stored(request, purpose, most, self._completion)
        if row["refusal"]:
            raise Refused(row["refusal"])
        numbers = row["prompt_tokens"], row["completion_tokens"], row["cached"]
        return Reply(row["text"], *numbers, row["finish_reason"], row["key"])

    def embed(self, texts: Sequence[str], *, model: str, purpose: str) -> list[list[float]]:
        """A vector for each text, from another model of the same endpoint. It is stored and charged like a reply.

        Raises: as `complete`.
        """
        request = {"model": model, "input": list(texts)}
        most = self._cost(sum(len(text.encode()) for text in texts), 0)
        row = self._stored(request, purpose, most, self._embedding)
        if row["refusal"]:
            raise Refused(row["refusal"])
        return json.loads(row["text"])

    def map(
        self, call: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """`(item, call(item))` in order, with `concurrency` calls in flight.

        The first error ends it, after the calls in flight are stored.
        """
        pool = futures.ThreadPoolExecutor(self.config.concurrency)
        try:
            pending = collections.deque((item, pool.submit(call, item)) for item in items)
            while pending:  # a result may hold pictures, so it is dropped as soon as it was used
                item, future = pending.popleft()
                yield item, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def usage(self) -> dict[str, Usage]:
        """What all runs with this cache have paid so far, by purpose."""
        return self.replies.usage()

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        prices = self.config.price_in, self.config.price_out
        return (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6

    def _stored(self, request, purpose, most, send) -> dict[str, Any]:
        """The stored answer to a request; sends it if there is none."""
        key = request_key(request)
        # A thread takes its slot before its claim, so that no claim waits for a slot.
        with self._slots:
            row = self.replies.claim(key, purpose, most)
            if row is not None:
                return row | {"cached": True}
            token = _CLAIM.set(_Claim(key))
            try:
                row = self._send(key, request, send)
            except BaseException:
                self.replies.release(key)
                raise
            finally:
                _CLAIM.reset(token)
            cost = self._cost(row["prompt_tokens"], row["completion_tokens"])
            self.replies.settle(key, purpose, row, cost)
        return row | {"key": key, "cached": False}

    def _send(self, key, request, send) -> dict[str, Any]:
        """Sends a request until it is answered.

        The openai package retries within one call of `send`. After that, this waits for an endpoint that answers no
        request, and gives up a prompt that fails while others are answered.
        """
        errors, began, wait = self._errors, time.monotonic(), 1.0
        failures = malformed = 0
        while True:
            answered = self._answered
            try:
                row = send(request)
            except (errors.BadRequestError, errors.UnprocessableEntityError) as error:
                raise self._rejection(error) from None
            except (
                errors.APIConnectionError,
                errors.RateLimitError,
                errors.InternalServerError,
                errors.ConflictError,
            ) as error:
                if isinstance(error.__cause__, Stop):
                    raise error.__cause__ from None
                failures += self._answered > answered
                if failures >= _PROMPT_FAILURES:
                    raise Refused("the endpoint fails on this prompt", _short(error)) from None
                self._check_patience(error, began, wait)
            except errors.APIStatusError as error:
                raise EndpointError(
                    f"{self._name()} refuses the request: {_short(error)}"
                ) from None
            # Proxies answer 200 with web pages or incomplete objects; the error depends on what is missing.
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                malformed += 1
                if malformed == MALFORMED_TRIES:
                    raise Refused("the reply is not a completion", _short(error)) from None
                continue
            else:
                self._answered += 1
                return row
            time.sleep(wait * random.uniform(0.75, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT)
            self.replies.renew(key)

    def _completion(self, request) -> dict[str, Any]:
        extra = {name: request[name] for name in self.config.extra_body}
        plain = {name: value for name, value in request.items() if name not in extra}
        completion = self._api.chat.completions.create(**plain, extra_body=extra or None)
        choice = completion.choices[0]
        text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
        if not isinstance(text, str | None) or not isinstance(choice.finish_reason, str | None):
            raise TypeError("its content is not text")
        filtered = choice.finish_reason == "content_filter" or (refusal and not text)
        # vLLM returns the reasoning here. Its tokens are charged, too.
        thoughts = getattr(choice.message, "reasoning_content", None)
        most = {
            "prompt_tokens": sum(_size(m, self.config.image_tokens) for m in request["messages"]),
            "completion_tokens": _size([text or "", thoughts or ""], 0),
        }
        return {
            "text": markup.whole_characters(text or ""),
            "finish_reason": choice.finish_reason or "",
            "refusal": "the model declines" if filtered else "",
            **_counted(completion.usage, most),
        }

    def _embedding(self, request) -> dict[str, Any]:
        answer = self._api.embeddings.create(**request, encoding_format="float")
        vectors = [entry.embedding for entry in sorted(answer.data, key=lambda entry: entry.index)]
        if len(vectors) != len(request["input"]):
            raise ValueError(f"{len(vectors)} vectors for {len(request['input'])} texts")
        most = {"prompt_tokens": _size(request["input"], 0), "completion_tokens": 0}
        return {
            "text": json.dumps(vectors),
            "finish_reason": "stop",
            "refusal": "",
            **_counted(answer.usage, most),
        }

    def _rejection(self, error) -> Exception:
        self._rejected += 1
        if self._rejected >= _FIRST_CALLS and not self._answered:
            return EndpointError(
                f"{self._name()} rejects every request, so the settings must be wrong: {_short(error)}"
            )
        return Refused("the endpoint rejects this prompt", _short(error))

    def _check_patience(self, error, began, wait) -> None:
        waited = time.monotonic() - began
        if waited + wait > self.config.patience:
            raise EndpointError(
                f"{self._name()} has not answered for {waited:,.0f} s ({_short(error)}); run the same "
                "command again when it is back; config.llm.patience says how long to wait for it"
            ) from None
        _log.warning("%s: %s; next try in %.0f s", self._name(), _short(error), wait)

    def _name(self) -> str:
        return f"{self.config.model} at {self.config.base_url or 'api.openai.com'}"


_CLIENTS: dict[str, Client] = {}
_CLIENTS_LOCK = threading.Lock()


def client(config: ClientConfig, cache: Path) -> Client:
    """The client of a model and cache. All threads of the process share it, and so its limits."""
    name = json.dumps([dataclasses.asdict(config), str(cache.resolve())], sort_keys=True)
    with _CLIENTS_LOCK:
        if name not in _CLIENTS:
            _CLIENTS[name] = Client(config, cache)
        return _CLIENTS[name]


def _size(value: Any, image_tokens: int) -> int:
    """The maximum number of tokens of a part of a prompt: a token has at least one byte."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "replace"))
    if isinstance(value, list):
        return sum(_size(part, image_tokens) for part in value)
    if not isinstance(value, Mapping):
        return 0
    if value.get("type") == "image_url":
        return image_tokens
    return _MESSAGE_TOKENS + sum(_size(part, image_tokens) for part in value.values())


def _counted(usage: Any, most: Mapping[str, int]) -> dict[str, int]:
    """The tokens that the endpoint counts. If it does not count them or says 0: the maximum."""
    told = {name: getattr(usage, name, None) for name in most}
    told = {name: count for name, count in told.items() if isinstance(count, int) and count > 0}
    is_estimated = any(most[name] > 0 and name not in told for name in most)
    return {**most, **told, "estimated": is_estimated}


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
