"""Asks a model for something that can be read, and once more if it cannot."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pangea_jax.curation import llm
from pangea_jax.curation.filters import words


class Unusable(ValueError):
    """An answer that cannot be used, for a reason that can be counted.

    Attributes:
      rest: what is usable of it all the same, if no better answer comes.
    """

    def __init__(self, reason: str, detail: str = "", rest: Any = None):
        self.reason, self.detail, self.rest = reason, detail, rest
        super().__init__(f"{reason} ({detail})" if detail else reason)


def ask(
    client: llm.Client,
    messages: Sequence[Mapping[str, Any]],
    purpose: str,
    read: Callable[[str], Any],
) -> Any:
    """What `read` makes of the model's answer; an unusable one is asked for once more, warmer.

    Raises:
      Unusable: neither answer can be used.
      llm.Refused, reply_store.Stop: see `llm.Client.complete`.
    """
    faults = []
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
    """The one of `choices` that a model named, whatever its case and punctuation.

    Raises:
      Unusable: `reason`, it is none of them.
    """

    def bare(text: str) -> str:
        return " ".join(words(text.replace("&", " and ")))

    named = {bare(name): name for name in choices}
    if bare(value) not in named:
        raise Unusable(reason, value[:60])
    return named[bare(value)]
