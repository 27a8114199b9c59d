"""Asks a model until its answer can be read, at most twice."""

from collections.abc import Callable, Sequence
from typing import Any

from pangea_jax.curation import llm
from pangea_jax.curation.accounting import Unfit
from pangea_jax.curation.filters import words


class Unusable(Unfit):
    """An answer that cannot be used.

    Attributes:
      rest: the usable part of the answer, used if there is no better answer.
    """

    def __init__(self, reason: str, detail: str = "", rest: Any = None):
        super().__init__(reason, detail)
        self.rest = rest


def ask(client: llm.Client, content: Any, purpose: str, read: Callable[[str], Any]) -> Any:
    """The result of `read` on the model's answer. If it is unusable, asks once more with a higher temperature.

    Args:
      content: content of the user's message in OpenAI's form, a text or a list of parts.

    Raises:
      Unusable: neither answer can be used.
      llm.Refused, reply_store.Stop: see `llm.Client.complete`.
    """
    faults, messages = [], [{"role": "user", "content": content}]
    for sampling in ({}, {"temperature": 0.7}):
        reply = client.complete(messages, purpose=purpose, **sampling)
        try:
            if reply.finish_reason == "length":
                raise Unusable("answer is cut off")
            return read(reply.text)
        except Unusable as fault:
            faults.append(fault)
    rest = next((fault.rest for fault in faults if fault.rest is not None), None)
    if rest is None:
        raise faults[-1]
    return rest


def choice(value: str, choices: Sequence[str], reason: str) -> str:
    """Finds the choice that a model named, in any case and with any punctuation.

    Raises:
      Unusable: it is not one of `choices`; has this `reason`.
    """

    def bare(text: str) -> str:
        return " ".join(words(text.replace("&", " and ")))

    named = {bare(name): name for name in choices}
    if bare(value) not in named:
        raise Unusable(reason, value[:60])
    return named[bare(value)]
