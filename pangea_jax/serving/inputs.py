"""From a request's messages to a prompt: pictures within limits, in threads of their own, never from this disk."""

import asyncio
import base64
import dataclasses
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from pangea_jax.data import image
from pangea_jax.generate.engine import Engine
from pangea_jax.generate.prompt import Prompt
from pangea_jax.serving.faults import Fault
from pangea_jax.serving.protocol import ImagePart, Message


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may hold, and how many may wait.

    Attributes:
      body: bytes of a request.
      pictures: of a request; pixels: of all of them together.
      prompt: tokens of a prompt, pictures included; answer: new tokens.
      waiting: requests beyond those that have rows. More get status 429.
      seconds: from a whole request to the end of its answer.
      upload_seconds: for the body of a request to arrive.
    """

    prompt: int
    answer: int
    body: int = 32 << 20
    pictures: int = 8
    pixels: int = 40_000_000
    waiting: int = 64
    seconds: float = 300.0
    upload_seconds: float = 60.0


# No vocabulary has many tokens of more letters. A text beyond this need not be tokenised to be refused.
_LETTERS = 64


class Inputs:
    """Reads requests for one engine.

    Args:
      fetch: reads the bytes behind an http(s) address (`pangea_jax.curation.web.Fetch`); None: addresses are refused.
      threads: number of requests that are read at once.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        fetch: Callable[[str], bytes] | None = None,
        threads: int = 2,
    ):
        self._engine, self._limits, self._fetch = engine, limits, fetch
        self._pool = futures.ThreadPoolExecutor(threads, "reader")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def chat(self, messages: Sequence[Message], new: int) -> Prompt:
        """The prompt of a chat that leaves room for `new` tokens.

        Raises:
          Fault: a picture cannot be used, or a limit is broken.
        """
        return await self._in_thread(self._chat, messages, new)

    async def text(self, prompt: str | Sequence[int], new: int) -> Prompt:
        """The prompt of a text, or of token ids.

        Raises:
          Fault: a limit is broken, or an id is not in the vocabulary.
        """
        return await self._in_thread(self._text, prompt, new)

    async def _in_thread(self, read: Callable[..., Prompt], *args: Any) -> Prompt:
        return await asyncio.get_running_loop().run_in_executor(self._pool, read, *args)

    def _chat(self, messages: Sequence[Message], new: int) -> Prompt:
        if messages[-1].role != "user":
            raise Fault(400, "the last message must be the user's", param="messages")
        left, pixels, read, letters = self._limits.pictures, self._limits.pixels, [], 0
        for i, message in enumerate(messages):
            content = message.content
            if not isinstance(content, str):
                parts = []
                for j, part in enumerate(content):
                    if not isinstance(part, ImagePart):
                        parts.append({"type": "text", "text": part.text})
                        letters += len(part.text)
                        continue
                    name = f"messages[{i}].content[{j}].image_url"
                    left -= 1
                    if left < 0:
                        most = self._limits.pictures
                        said = f"{name}: a request may have {most} pictures"
                        raise Fault(400, said, param=name, code="too_many_pictures")
                    data = self._picture(part.image_url.url, name)
                    pixels -= self._pixels(data, name, pixels)
                    parts.append({"type": "image", "image": data})
                content = parts
            else:
                letters += len(content)
            role = "system" if message.role == "developer" else message.role
            read.append({"role": role, "content": content})
        return self._read(read, letters, new, "messages")

    def _text(self, prompt: str | Sequence[int], new: int) -> Prompt:
        if isinstance(prompt, str):
            return self._read(prompt, len(prompt), new, "prompt")
        size = self._engine.config.language.vocab_size
        if max(prompt) >= size:
            raise Fault(400, f"prompt: a token id is not below {size}", param="prompt")
        self._check_length(len(prompt), new, "prompt")
        tokens = np.array(prompt, np.int32)
        if self._engine.tokenizer.image_id in prompt:
            raise Fault(400, "prompt: the id of a picture stands alone", param="prompt")
        return Prompt(tokens, np.full_like(tokens, -1), self._engine.reader.no_tiles)

    def _read(self, conversation: Any, letters: int, new: int, param: str) -> Prompt:
        most = self._limits.prompt
        if letters > _LETTERS * most:
            message = f"{param}: {letters:,} letters cannot be a prompt of {most:,} tokens"
            raise Fault(400, message, param=param, code="context_length_exceeded")
        try:
            prompt = self._engine.read(conversation)
        except image.ImageError as error:
            raise Fault(400, str(error), param=param, code="invalid_image") from None
        except ValueError as error:
            code = "context_length_exceeded" if "context of" in str(error) else "invalid_value"
            raise Fault(400, str(error), param=param, code=code) from None
        self._check_length(len(prompt.tokens), new, param)
        return prompt

    def _check_length(self, length: int, new: int, param: str) -> None:
        limits, context = self._limits, self._engine.config.language.max_positions
        if length > limits.prompt or length + new > context:
            raise Fault(
                400,
                f"{param}: {length:,} tokens and {new:,} new ones exceed the model's context of {context:,} tokens "
                f"or this server's limit of {limits.prompt:,} for a prompt",
                param=param,
                code="context_length_exceeded",
            )

    def _picture(self, url: str, name: str) -> bytes:
        header, comma, data = url.partition(",")
        if comma and header.startswith("data:") and header.endswith(";base64"):
            try:
                return base64.b64decode(data, validate=True)
            except ValueError:
                message = f"{name}: the picture is not valid base64"
                raise Fault(400, message, param=name, code="invalid_image") from None
        if not url.startswith(("http://", "https://")):
            message = f"{name}: expected data:image/...;base64,..."
            raise Fault(400, message, param=name, code="invalid_image_url")
        if self._fetch is None:
            message = f"{name}: this server reads no addresses; send data:image/...;base64,..."
            raise Fault(400, message, param=name, code="invalid_image_url")
        from pangea_jax.curation.web import FetchError

        try:
            return self._fetch(url)
        except FetchError as error:
            raise Fault(400, f"{name}: {error}", param=name, code="invalid_image_url") from None

    def _pixels(self, data: bytes, name: str, left: int) -> int:
        """The number of pixels, from the header alone."""
        try:
            width, height = image.header_size(data, name=name)
        except image.ImageError as error:
            raise Fault(400, str(error), param=name, code="invalid_image") from None
        if width * height > left:
            most = self._limits.pixels
            message = f"{name}: the pictures of a request may have {most:,} pixels together"
            raise Fault(400, message, param=name, code="image_too_large")
        return width * height
