"""From a request to its reply: places in the queue, deadlines, and OpenAI's objects, whole or as a stream."""

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
from fastapi.responses import JSONResponse, Response

from pangea_jax.generate.batching import Progress, StopStrings
from pangea_jax.generate.decode import Likely, Sampling
from pangea_jax.generate.prompt import Prompt
from pangea_jax.serving import faults, replies
from pangea_jax.serving.engine_loop import Answer, EngineLoop
from pangea_jax.serving.faults import Fault
from pangea_jax.serving.inputs import Inputs, Limits
from pangea_jax.serving.meters import Meters
from pangea_jax.serving.protocol import ChatRequest, CompletionRequest
from pangea_jax.serving.replies import Growing

# After its deadline a stream may still send what it has.
_GRACE_SECONDS = 5.0


class Ticket:
    """The places of one request in the queue, and its deadline."""

    def __init__(self, count: int, seconds: float, back: Callable[["Ticket"], None]):
        self.count, self.begun, self.end = count, time.monotonic(), time.monotonic() + seconds
        self._back, self._answers = back, []

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def watch(self, answer: Answer) -> None:
        self._answers.append(answer)

    def close(self) -> None:
        """Gives the places back, and rows that are still in use."""
        back, self._back = self._back, lambda _: None
        for answer in self._answers:
            answer.cancel()
        back(self)


class Service:
    """One model behind the API.

    Args:
      name: of the model in requests.
      temperature: of requests that give none.
    """

    def __init__(
        self,
        name: str,
        loop: EngineLoop,
        inputs: Inputs,
        limits: Limits,
        meters: Meters,
        temperature: float = 0.0,
    ):
        self.name, self.loop, self.inputs, self.limits = name, loop, inputs, limits
        self.meters, self._temperature = meters, temperature
        self.created = int(time.time())
        self.words = replies.Words(loop.engine.tokenizer)
        self._places, self._seconds = 0, 1.0
        meters.waiting.set_function(lambda: max(0, self._places - meters.rows_now))

    @property
    def context(self) -> int:
        return self.loop.engine.config.language.max_positions

    def admit(self, count: int = 1) -> Ticket:
        """
        Raises:
          Fault: the queue is full, or the server is stopping.
        """
        most = self.loop.rows + self.limits.waiting
        if not self.loop.is_alive:
            raise Fault(503, "the server is stopping", code="unavailable")
        if count > most:
            raise Fault(400, f"prompt: at most {most} prompts in a request", param="prompt")
        if self._places + count > most:
            # How long the queue will take, from what answers took lately.
            wait = self._seconds * (self._places + count - self.loop.rows) / self.loop.rows
            after = {"Retry-After": str(min(60, max(1, math.ceil(wait))))}
            raise Fault(429, "the queue is full; try again", code="queue_full", headers=after)
        self._places += count
        return Ticket(count, self.limits.seconds, self._give_back)

    def _give_back(self, ticket: Ticket) -> None:
        self._places -= ticket.count
        seconds = time.monotonic() - ticket.begun
        self._seconds += 0.1 * (seconds - self._seconds)
        self.meters.whole.observe(seconds)

    def check(self, body: ChatRequest | CompletionRequest, new: int | None) -> None:
        """
        Raises:
          Fault: fields do not fit one another or this server.
        """
        if body.model != self.name:
            message = f"model: this server has {self.name!r}"
            raise Fault(404, message, param="model", code="model_not_found")
        if body.stream_options and not body.stream:
            raise Fault(400, "stream_options: only with stream", param="stream_options")
        if new is not None and new > self.limits.answer:
            most = self.limits.answer
            raise Fault(
                400,
                f"max_tokens: {new:,} is more than the server's {most:,} (--max_tokens)",
                param="max_tokens",
                code="context_length_exceeded",
            )
        for stop in body.stop_strings:
            if not stop:
                raise Fault(400, "stop: a text is empty", param="stop")

    def ask(
        self,
        ticket: Ticket,
        body: ChatRequest | CompletionRequest,
        prompt: Prompt,
        new: int | None,
        wants: bool,
    ) -> Answer:
        """Puts a request into the queue of the engine."""
        room = min(self.limits.answer, self.context - len(prompt.tokens))
        temperature = self._temperature if body.temperature is None else body.temperature
        seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
        sampling = Sampling.make(
            1,
            temperature=float(temperature),
            top_p=1.0 if body.top_p is None else float(body.top_p),
            top_k=max(0, body.top_k or 0),
            seed=seed,
        )
        answer = Answer(
            prompt=prompt,
            sampling=sampling,
            limit=room if new is None else new,
            ends=StopStrings(body.stop_strings) if body.stop_strings else None,
            wants=wants,
        )
        ticket.watch(answer)
        self.loop.submit(answer)
        self.meters.prompt_tokens.inc(len(prompt.tokens))
        return answer

    def growing(self, body: ChatRequest | CompletionRequest) -> Growing:
        engine = self.loop.engine
        return Growing(engine.tokenizer, self.loop.stop_ids, body.stop_strings)

    async def follow(self, ticket: Ticket, answer: Answer) -> AsyncIterator[Progress]:
        """Yields how an answer goes on, until it has ended.

        Raises:
          Fault: the deadline is over, or the engine failed.
        """
        told, last = 0, None
        while True:
            try:
                progress = await answer.news(ticket.seconds_left)
            except TimeoutError:
                said = f"no whole answer within {self.limits.seconds:g} s"
                raise Fault(504, said, code="deadline_exceeded") from None
            now, new = time.monotonic(), len(progress.tokens) - told
            if last is None:
                self.meters.first_token.observe(now - ticket.begun)
            elif new:
                self.meters.between_tokens.observe((now - last) / new)
            self.meters.new_tokens.inc(new)
            told, last = len(progress.tokens), now
            yield progress
            if progress.ended:
                return


class Chat:
    """The reply to one chat."""

    def __init__(self, service: Service, ticket: Ticket, body: ChatRequest, prompt: Prompt):
        new = body.max_completion_tokens or body.max_tokens
        self._service, self._ticket, self._prompt = service, ticket, len(prompt.tokens)
        self._top = (body.top_logprobs or 0) if body.logprobs else None
        self._answer = service.ask(ticket, body, prompt, new, self._top is not None)
        self._growing = service.growing(body)
        self._told = 0
        self._counts = bool(body.stream_options and body.stream_options.include_usage)

    async def whole(self) -> dict[str, Any]:
        growing = self._growing
        async for progress in self._service.follow(self._ticket, self._answer):
            growing.grow(progress)
        message = {"role": "assistant", "content": growing.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": self._logprobs()}
        reply = replies.envelope("chat.completion", self._service.name)
        return {
            **reply,
            "choices": [{**choice, "finish_reason": growing.ended}],
            "usage": replies.usage(self._prompt, growing.used),
        }

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        growing = self._growing
        reply = dict(replies.envelope("chat.completion.chunk", self._service.name))
        if self._counts:
            reply["usage"] = None

        def chunk(delta, logprobs=None, finish=None):
            choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return reply | {"choices": [choice]}

        is_first = True
        async for progress in self._service.follow(self._ticket, self._answer):
            if is_first:
                yield chunk({"role": "assistant", "content": ""})
                is_first = False
            new = growing.grow(progress)
            logprobs = self._logprobs()
            if new or (logprobs and logprobs["content"]):
                yield chunk({"content": new}, logprobs)
        yield chunk({}, finish=growing.ended)
        if self._counts:
            used = replies.usage(self._prompt, growing.used)
            yield reply | {"choices": [], "usage": used}

    def _logprobs(self) -> dict[str, Any] | None:
        """Of the tokens that were shown since the last call."""
        if self._top is None:
            return None
        shown, start = self._growing.shown, self._told
        self._told = max(shown, start)
        likely, ids = replies.joined(self._answer.likely), self._growing.ids[:shown]
        content = self._service.words.chat(ids, likely, start, self._top)
        return {"content": content, "refusal": None}


class Completion:
    """The reply to one prompt of a completion; `index` is the prompt's number."""

    def __init__(
        self, service: Service, ticket: Ticket, body: CompletionRequest, index: int, prompt: Prompt
    ):
        self._service, self._ticket, self._index = service, ticket, index
        self._ids, self._top = prompt.tokens.tolist(), body.logprobs
        self.prompt_tokens, given = len(self._ids), body.prompts[index]
        decode = service.loop.engine.tokenizer.decode
        self._before = (given if isinstance(given, str) else decode(given)) if body.echo else ""
        self._echoed = None
        if body.echo and body.logprobs is not None:
            self._echoed = service.loop.echo([prompt])
        self._answer, self._growing = None, service.growing(body)
        if body.max_tokens != 0:
            wants = body.logprobs is not None
            new = 16 if body.max_tokens is None else body.max_tokens
            self._answer = service.ask(ticket, body, prompt, new, wants)
        self._told = 0

    @property
    def used(self) -> int:
        return self._growing.used

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Yields choices, each with the text that is new; the last one has a `finish_reason`."""
        text, logprobs = self._before, None
        if self._echoed is not None:
            logprobs = self._of_prompt(await self._wait(self._echoed))
        if self._answer is None:
            yield self._choice(text, logprobs, "length")
            return
        if text or logprobs:
            yield self._choice(text, logprobs, None)
        async for progress in self._service.follow(self._ticket, self._answer):
            new = self._growing.grow(progress)
            yield self._choice(new, self._of_answer(), progress.ended or None)

    async def whole(self) -> dict[str, Any]:
        """All pieces in one."""
        pieces = [piece async for piece in self.pieces()]
        some = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
        logprobs = {key: [y for x in some for y in x[key]] for key in some[0]} if some else None
        text = "".join(piece["text"] for piece in pieces)
        return self._choice(text, logprobs, pieces[-1]["finish_reason"])

    def _choice(self, text, logprobs, finish) -> dict[str, Any]:
        choice = {"text": text, "index": self._index, "logprobs": logprobs}
        return choice | {"finish_reason": finish}

    async def _wait(self, found) -> Likely:
        try:
            async with asyncio.timeout(self._ticket.seconds_left):
                return (await asyncio.wrap_future(found))[0]
        except TimeoutError:
            said = f"no whole answer within {self._service.limits.seconds:g} s"
            raise Fault(504, said, code="deadline_exceeded") from None

    def _of_prompt(self, likely: Likely) -> dict[str, list]:
        chosen = np.array(likely.chosen, np.float32)
        chosen[0] = np.nan
        likely = likely.replace(chosen=chosen)
        return self._service.words.completion(self._ids, likely, 0, self._top, 0)

    def _of_answer(self) -> dict[str, list] | None:
        if self._top is None:
            return None
        shown, start = self._growing.shown, self._told
        self._told = max(shown, start)
        likely, ids = replies.joined(self._answer.likely), self._growing.ids[:shown]
        offset = len(self._before)
        return self._service.words.completion(ids, likely, start, self._top, offset)


class Completions:
    """The reply to all prompts of a completion."""

    def __init__(
        self, service: Service, ticket: Ticket, body: CompletionRequest, prompts: Sequence[Prompt]
    ):
        self._parts = [
            Completion(service, ticket, body, index, prompt) for index, prompt in enumerate(prompts)
        ]
        self._reply = dict(replies.envelope("text_completion", service.name))
        self._counts = bool(body.stream_options and body.stream_options.include_usage)

    @property
    def _usage(self) -> dict[str, int]:
        return replies.usage(
            sum(part.prompt_tokens for part in self._parts), sum(part.used for part in self._parts)
        )

    async def whole(self) -> dict[str, Any]:
        choices = [await part.whole() for part in self._parts]
        return self._reply | {"choices": choices, "usage": self._usage}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        reply = self._reply | ({"usage": None} if self._counts else {})
        for part in self._parts:
            async for piece in part.pieces():
                if piece["text"] or piece["logprobs"] or piece["finish_reason"]:
                    yield reply | {"choices": [piece]}
        if self._counts:
            yield reply | {"choices": [], "usage": self._usage}


class Answering(Response):
    """Sends a reply, whole or as server-sent events, and gives its ticket back.

    If the client goes, the rows are free after the next steps. A stream that fails before its first event has the
    status of the fault; later the fault is its last event.
    """

    def __init__(self, ticket: Ticket, reply: Chat | Completions, stream: bool, meters: Meters):
        super().__init__()
        self._ticket, self._reply, self._stream, self._meters = ticket, reply, stream, meters

    async def __call__(self, scope, receive, send):
        send_all = self._send_events if self._stream else self._send_whole
        work = asyncio.create_task(send_all(scope, receive, send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            seconds = self._ticket.seconds_left + _GRACE_SECONDS
            done, _ = await asyncio.wait(
                {work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if work in done:
                return work.result()
            self._meters.cancelled.inc()
        finally:
            self._ticket.close()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not done:
            raise TimeoutError("the client reads too slowly")

    async def _send_whole(self, scope, receive, send) -> None:
        found = await self._reply.whole()
        self._ticket.close()  # a slow reader does not keep its place
        await JSONResponse(found)(scope, receive, send)

    async def _send_events(self, scope, receive, send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers += [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        start = {"type": "http.response.start", "status": 200, "headers": headers}

        async def put(data: bytes, more: bool = True):
            await send({"type": "http.response.body", "body": data, "more_body": more})

        events = self._reply.events()
        async with contextlib.aclosing(events):
            first = await anext(events)
            await send(start)
            await put(faults.event(first))
            try:
                async for event in events:
                    await put(faults.event(event))
            except Fault as fault:
                return await put(faults.event(fault.body), more=False)
        await put(faults.event("[DONE]"), more=False)


async def _until_gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
