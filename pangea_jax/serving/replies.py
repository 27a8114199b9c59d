"""What a client reads: an answer's text as it grows, its log-probabilities, and OpenAI's objects around them."""

import codecs
import functools
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.generate.batching import Progress, StopStrings
from pangea_jax.generate.decode import Likely, until

# JSON has no -inf; OpenAI writes this.
_LEAST = -9999.0


class Growing:
    """The text of one answer.

    Attributes:
      text: what was told until now. It never ends within a character, or with what may become a stop string.
      ended: see `Progress`.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], stops: Sequence[str]):
        self._tokenizer, self._stop_ids, self._stops = tokenizer, stop_ids, tuple(stops)
        self._ends = StopStrings(stops) if stops else None
        self._tokens: list[int] = []
        self.text, self.ended = "", ""

    def grow(self, progress: Progress) -> str:
        """The text that is new."""
        self._tokens, self.ended = progress.tokens, progress.ended
        text = progress.text
        if text is None:
            text = self._tokenizer.decode(self.ids)
        if not self.ended:
            text = self._ends.safe(text) if self._ends else text.rstrip("\ufffd")
        new = text[len(self.text) :]
        self.text += new
        return new

    @property
    def ids(self) -> list[int]:
        """The tokens until now, without the one that ended the answer."""
        return until(self._tokens, self._stop_ids)

    @property
    def shown(self) -> int:
        """The number of tokens that begin within the text."""
        return sum(start < len(self.text) for start in offsets(self._tokenizer, self.ids))

    @property
    def used(self) -> int:
        """The number of tokens of the answer: up to the end of a stop string, although a few more were computed."""
        if not (self._stops and self.ended == "stop"):
            return len(self._tokens)
        ids = self.ids
        whole, cut = self._tokenizer.decode(ids), len(self.text)
        found = [len(stop) for stop in self._stops if whole.startswith(stop, cut)]
        if not found:
            return len(self._tokens)
        return sum(start < cut + min(found) for start in offsets(self._tokenizer, ids))


def offsets(tokenizer: Tokenizer, ids: Sequence[int], start: int = 0) -> list[int]:
    """The place in the text where each token begins. Special tokens have no text."""
    decoder, places = codecs.getincrementaldecoder("utf-8")("replace"), []
    for id in ids:
        places.append(start)
        if tokenizer.decode([id]):
            start += len(decoder.decode(tokenizer.piece(id)))
    return places


def joined(parts: Sequence[Likely]) -> Likely:
    """Log-probabilities of pieces of an answer, one after the other."""
    if not parts:
        return Likely(np.zeros(0), np.zeros((0, 0), np.int32), np.zeros((0, 0)))
    fields = ("chosen", "ids", "values")
    return Likely(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


class Words:
    """How log-probabilities are written, for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._piece = functools.lru_cache(1 << 16)(tokenizer.piece)

    def chat(self, ids: Sequence[int], likely: Likely, start: int, top: int) -> list[dict]:
        """Of the tokens from `start` on, as in chats."""
        return [
            self._entry(id, likely.chosen[place])
            | {
                "top_logprobs": [
                    self._entry(int(other), value)
                    for other, value in zip(likely.ids[place, :top], likely.values[place, :top])
                ]
            }
            for place, id in enumerate(ids[start:], start)
        ]

    def _entry(self, id: int, value: float) -> dict[str, Any]:
        piece = self._piece(id)
        text = piece.decode("utf-8", "replace")
        return {"token": text, "logprob": _finite(value), "bytes": list(piece)}

    def completion(
        self, ids: Sequence[int], likely: Likely, start: int, top: int, offset: int
    ) -> dict[str, list]:
        """Of the tokens from `start` on, as in completions; `offset`: where the text of all ids begins."""
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        places = offsets(self._tokenizer, ids, offset)
        for place, id in enumerate(ids[start:], start):
            value = float(likely.chosen[place])
            unknown = value != value  # the first token of a prompt comes after nothing
            top_ids, values = likely.ids[place, :top], likely.values[place, :top]
            best = {self._name(int(i)): _finite(v) for i, v in zip(top_ids, values)}
            found["tokens"].append(self._name(id))
            found["token_logprobs"].append(None if unknown else _finite(value))
            best.setdefault(self._name(id), _finite(value))
            found["top_logprobs"].append(None if unknown else best)
            found["text_offset"].append(places[place])
        return found

    def _name(self, id: int) -> str:
        """A text for each token; parts of a character differ, as in OpenAI's."""
        piece = self._piece(id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(value: float) -> float:
    return max(float(value), _LEAST)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def envelope(kind: str, model: str) -> Mapping[str, Any]:
    """The fields that all objects of one reply share; `kind` is OpenAI's `object`."""
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    name = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}
