"""An OpenAI-compatible chat endpoint: many calls at once, each retried with back-off, none fatal."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from eval.bench.task import Failed

Item = TypeVar("Item")


class Endpoint:
    """One model at one address.

    Args:
      base_url: of the API, `https://host/v1`; None for OpenAI's own. The key is read from OPENAI_API_KEY.
      concurrency: calls under way at once.
      retries: attempts after the first, where the endpoint is busy (429), broken (5xx) or silent. The waits double
        from half a second, unless the endpoint asks for a longer one.
      timeout: seconds before a call counts as unanswered.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        concurrency: int = 8,
        retries: int = 6,
        timeout: float = 120.0,
    ):
        try:
            import openai
        except ImportError:
            raise ImportError(
                "endpoints need the openai package; run: pip install -r requirements-eval.txt"
            ) from None
        self._openai = openai
        self.model, self.concurrency = model, concurrency
        self._client = openai.OpenAI(
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            base_url=base_url,
            max_retries=retries,
            timeout=timeout,
        )

    def chat(self, messages: Sequence[dict[str, Any]], **settings: Any) -> str | Failed:
        """The reply to a conversation, or why there is none."""
        try:
            completion = self._client.chat.completions.create(
                model=self.model, messages=list(messages), **settings
            )
            text = completion.choices[0].message.content
        except self._openai.OpenAIError as error:
            return Failed(f"endpoint: {type(error).__name__}: {error}"[:300])
        # Proxies answer 200 with pages and half-made objects, which surface as whatever they lack.
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            return Failed(f"endpoint: the reply is no chat completion ({error})"[:300])
        if not isinstance(text, str):
            return Failed("endpoint: the reply has no text")
        # Half a character, as a proxy may cut one, cannot be written to any file.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def map(self, items: Sequence[Item], call: Callable[[Item], Any]) -> Iterator[tuple[Item, Any]]:
        """`(item, call(item))` as they are done."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = {pool.submit(call, item): item for item in items}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
