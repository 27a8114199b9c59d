"""A model reads alt texts, without the pictures, and names quality, subject and country (paper, section 2.2)."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pangea_jax.curation import llm
from pangea_jax.curation.accounting import Dropped, Outcome, Passed, Unfit
from pangea_jax.curation.asking import Unusable, ask, choice
from pangea_jax.curation.prompts import SCORING, SUBJECTS

MIN_QUALITY = 4

_MAX_SCORE_CHARS = 2_000


@dataclasses.dataclass(frozen=True)
class ScoreAltTexts:
    """Passes the rows whose alt text a model judges as good and related to a country."""

    llm: llm.ClientConfig
    replies: Path

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        client = llm.client(self.llm, self.replies)
        for _, outcome in client.map(functools.partial(self._score, client), rows):
            yield outcome

    def _score(self, client: llm.Client, row: Mapping[str, Any]) -> Outcome:
        prompt = SCORING.format(text=row["text"], subjects="; ".join(SUBJECTS))
        try:
            score = ask(client, prompt, "score", read_score)
        except Unfit as error:
            return error.dropped(row["id"], "scoring")
        if score["quality"] < MIN_QUALITY:
            return Dropped(row["id"], "quality", f"quality {score['quality']}")
        if score["country"] is None:
            return Dropped(row["id"], "country", "no specific country")
        return Passed({**row, **score})


# With possessive quantifiers, since without them a line of a thousand asterisks takes a million steps.
_SCORE_LINE = re.compile(
    r"[^\w:]*+([123])?[.)]?[^\w:]*+(text quality|subject|country)?[^:\n]*+:\s*+(.*)", re.I
)
_PLAIN_LINE = re.compile(r"\W*+([123])[.)]\s++()(.*)")
_KEYS = {"1": "quality", "2": "subject", "3": "country"}


def read_score(answer: str) -> dict[str, Any]:
    """Reads the model's three lines: quality 1 to 5, subject of `SUBJECTS`, country (None for none).

    >>> read_score("1. Text Quality Score (1-5): 4\\n2. Subject Category: Cooking and Food\\n3. Country/Region: Japan")
    {'quality': 4, 'subject': 'Cooking and Food', 'country': 'Japan'}

    Raises:
      Unusable: a value is missing, or not one of the choices.
    """
    if len(answer) > _MAX_SCORE_CHARS:
        raise Unusable("answer is not a score", f"{len(answer):,} characters")
    found: dict[str, str] = {}
    for line in answer.splitlines():
        match = _SCORE_LINE.fullmatch(line) or _PLAIN_LINE.fullmatch(line)
        if match:
            word = (match[2] or "").lower().removeprefix("text ")
            key = word or _KEYS.get(match[1] or "")
            if key and key not in found:
                found[key] = match[3].strip(" \t*_`\"'.[]")
    missing = {"quality", "subject", "country"} - found.keys()
    if missing:
        raise Unusable("answer is not a score", f"no {', '.join(sorted(missing))}")
    quality = re.fullmatch(r"([1-5])(?:\.0)?(?:\s*(?:/\s*5|\(.*\)))?", found["quality"])
    if quality is None:
        raise Unusable("quality is not 1 to 5", found["quality"][:60])
    return {
        "quality": int(quality[1]),
        "subject": choice(found["subject"], SUBJECTS, "subject is not among the eleven"),
        "country": _country(found["country"]),
    }


def _country(value: str) -> str | None:
    if re.match(r"(?:no |not |none\b|n/a\b|unspecified|global\b|worldwide)", value, re.I):
        return None
    # The name goes into a prompt, so only a few words are allowed, without digits and most punctuation.
    if not 2 <= len(value) <= 60 or not re.fullmatch(r"[^\W\d_][^\d_\n:;<>{}|]*", value):
        raise Unusable("country is not a name", value[:60])
    return value
