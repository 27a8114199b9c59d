"""A client for an OpenAI-compatible chat endpoint: many calls at once, with retries. A failed call never ends the run.

pangea_jax/curation/llm.py is another client. That one waits hours for an endpoint, keeps a budget, stores replies for
many processes and raises errors. This one gives a document up after its retries and stores nothing, because the
response log does. Both leave the retries to the openai package, and one class for both would be longer.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from eval.bench.task import Failed
from pangea_jax.work import transport

Item = TypeVar("Item")


class Endpoint:
    """One model at one address.

    Args:
      base_url: of the API, `https://host/v1`; None for OpenAI's own. The key is read from OPENAI_API_KEY.
      concurrency: number of calls at once.
      retries: attempts after the first, if the endpoint is busy (429), fails (5xx) or does not answer. The first wait
        is half a second and each wait doubles, unless the endpoint asks for a longer one.
      timeout: seconds for a whole answer, after which an attempt fails.
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
            http_client=transport.limited(openai.DefaultHttpxClient, timeout)(),
        )

    def chat(self, messages: Sequence[dict[str, Any]], **settings: Any) -> str | Failed:
        """The reply to a conversation, or the reason why there is none."""
        try:
            completion = self._client.chat.completions.create(
                model=self.model, messages=list(messages), **settings
            )
            text = completion.choices[0].message.content
        except self._openai.OpenAIError as error:
            return Failed(f"endpoint: {type(error).__name__}: {error}"[:300])
        # Some proxies answer 200 with a web page or an incomplete object.
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            return Failed(f"endpoint: the reply is not a chat completion ({error})"[:300])
        if not isinstance(text, str):
            return Failed("endpoint: the reply has no text")
        # A proxy may cut a character in half (a lone surrogate), which cannot be written to a file.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def echo(self, text: str) -> list[float | None] | Failed:
        """The log-probability of each token of a text after those before it, None for the first.

        It comes from `/v1/completions` with `echo` and `logprobs`, as vLLM and llama.cpp's Python server have them. The
        one token that is generated too is left out. The result is `Failed` if the endpoint does not do this.
        """
        try:
            completion = self._client.completions.create(
                model=self.model, prompt=text, max_tokens=1, echo=True, logprobs=1, temperature=0.0
            )
            found = list(completion.choices[0].logprobs.token_logprobs)
            # Like lm-eval, take the last one for the generated token if the endpoint does not count them.
            tokens = completion.usage.prompt_tokens if completion.usage else len(found) - 1
        except self._openai.OpenAIError as error:
            return Failed(f"endpoint: {type(error).__name__}: {error}"[:300])
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            return Failed(f"endpoint: the reply has no log-probabilities ({error})"[:300])
        if not isinstance(tokens, int) or not 1 <= tokens <= len(found) <= tokens + 1:
            return Failed(f"endpoint: it gives {len(found)} log-probabilities for {tokens} tokens")
        if not all(isinstance(value, float | int) for value in found[1:tokens]):
            return Failed("endpoint: a log-probability is no number")
        return found[:tokens]

    def map(self, items: Sequence[Item], call: Callable[[Item], Any]) -> Iterator[tuple[Item, Any]]:
        """Yields `(item, call(item))` as each call finishes."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = {pool.submit(call, item): item for item in items}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
