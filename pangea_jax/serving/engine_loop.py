"""One thread answers all requests, in one batch (`pangea_jax.generate.batching.run`), for the life of the server."""

import asyncio
import collections
import contextlib
import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from pangea_jax.generate import batching
from pangea_jax.generate.decode import Likely
from pangea_jax.generate.engine import STREAM_SECONDS, Engine, bucket
from pangea_jax.generate.prompt import Prompt
from pangea_jax.serving.faults import Fault
from pangea_jax.serving.inputs import Limits
from pangea_jax.serving.protocol import MOST_LIKELY

# Failures one after the other, without an answer between them, after which the server gives up.
_FAILURES = 3
_BROKEN = Fault(500, "the model failed; the server's log says where", code="engine_failed")
_log = logging.getLogger(__name__)


class Answer:
    """What the engine's thread has said about a request, for the event loop that asked.

    Only the newest `Progress` is kept, because it has all tokens. So a slow reader costs no memory.
    """

    def __init__(self, **request: Any):
        self.request = batching.Request(self, **request)
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._latest: batching.Progress | Fault | None = None
        self.likely: list[Likely] = []

    def tell(self, news: batching.Progress | Fault) -> None:
        """Called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._put, news)

    def _put(self, news: batching.Progress | Fault) -> None:
        self._latest = news
        if isinstance(news, batching.Progress) and news.likely is not None:
            self.likely.append(news.likely)
        self._changed.set()

    async def news(self, seconds: float) -> batching.Progress:
        """How the answer has gone on since the last call; the last one has `ended`.

        Raises:
          TimeoutError: nothing new came within so many seconds.
          Fault: the engine failed.
        """
        async with asyncio.timeout(seconds):
            await self._changed.wait()
        self._changed.clear()
        if isinstance(self._latest, Fault):
            raise self._latest
        return self._latest

    def cancel(self) -> None:
        self.request.cancelled = True


class EngineLoop:
    """The thread of the engine.

    Args:
      rows: answers at once.
      chunk: see `batching.run`.
      on_step: called between steps with the number of rows in use.
      on_broken: called once if the engine has failed too often.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        *,
        rows: int,
        chunk: int | None = 512,
        on_step: Callable[[int], None] = lambda rows: None,
        on_broken: Callable[[], None] = lambda: None,
    ):
        self.engine, self.rows = engine, rows
        context = engine.config.language.max_positions
        self.width = min(bucket(limits.prompt), context)
        self._slots, self._chunk = bucket(limits.answer), chunk
        self.stop_ids = (engine.tokenizer.im_end_id, engine.tokenizer.pad_id)
        self.top = min(MOST_LIKELY, engine.config.language.vocab_size)
        self._on_step, self._on_broken = on_step, on_broken
        self._waiting: collections.deque[Answer] = collections.deque()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._changed, self._closing = threading.Condition(), False
        self._taken: set[Answer] = set()
        self._batch: batching.Batch | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; answers under way are cancelled."""
        with self._changed:
            self._closing = True
            for answer in [*self._taken, *self._waiting]:
                answer.cancel()
            self._changed.notify()
        self._thread.join(timeout=30)

    def submit(self, answer: Answer) -> None:
        """
        Raises:
          Fault: the thread has ended.
        """
        with self._changed:
            if not self.is_alive:
                raise Fault(503, "the server is stopping", code="unavailable")
            self._waiting.append(answer)
            self._changed.notify()

    def echo(self, prompts: Sequence[Prompt]) -> "futures.Future[list[Likely]]":
        """The log-probabilities of the prompts' own tokens (`Engine.echo`), between two steps of the answers."""
        found: futures.Future = futures.Future()

        def call():
            if found.set_running_or_notify_cancel():
                try:
                    found.set_result(self.engine.echo(prompts, self.top))
                except Exception as error:
                    _report(error)
                    found.set_exception(_BROKEN)

        with self._changed:
            if not self.is_alive:
                raise Fault(503, "the server is stopping", code="unavailable")
            self._calls.append(call)
            self._changed.notify()
        return found

    def _take(self, most: int, wait: bool) -> list[batching.Request]:
        """What `batching.run` asks for; runs the calls on its way."""
        if self._batch is not None:
            self._on_step(self._batch.rows - len(self._batch.free))
        while True:
            with self._changed:
                if wait:
                    self._changed.wait_for(lambda: self._waiting or self._calls or self._closing)
                call = self._calls.popleft() if self._calls else None
                found = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
                found = [answer for answer in found if not answer.request.cancelled]
                self._taken.update(found)
            if call:
                call()
            if found or not wait or (self._closing and not self._calls):
                return [answer.request for answer in found]

    def _run(self) -> None:
        failures = 0
        while not self._closing and failures < _FAILURES:
            try:
                self._batch = self.engine.open(
                    self.rows, self.width, self._slots, stop=self.stop_ids, top=self.top
                )
                steps = batching.run(
                    self._batch, self._take, chunk=self._chunk, pace=STREAM_SECONDS
                )
                for progress in steps:
                    answer = progress.request.name
                    answer.tell(progress)
                    if progress.ended:
                        failures = 0
                        self._taken.discard(answer)
                    self._forget_cancelled()
            except Exception as error:
                failures += 1
                _report(error)
                for answer in self._taken:
                    answer.tell(_BROKEN)
                self._taken.clear()
        if failures >= _FAILURES:
            self._give_up()

    def _forget_cancelled(self) -> None:
        for answer in [answer for answer in self._taken if answer.request.cancelled]:
            self._taken.discard(answer)

    def _give_up(self) -> None:
        with self._changed:
            self._closing = True
            for answer in self._waiting:
                answer.tell(_BROKEN)
            calls = list(self._calls)
        for call in calls:
            call()
        self._on_broken()


def _report(error: Exception) -> None:
    """Logs where an error came from, without its message: that may hold a text of a request."""
    where = "".join(traceback.format_tb(error.__traceback__))
    _log.error("the engine failed with %s\n%s", type(error).__name__, where)
