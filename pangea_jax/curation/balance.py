"""Frequent subjects and languages thinned out, as MetaCLIP does its entries (Xu et al. 2024)."""

import dataclasses
import hashlib
import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from pangea_jax.curation.accounting import Dropped, Outcome, Passed
from pangea_jax.curation.workflow import Job


@dataclasses.dataclass(frozen=True)
class Balance:
    """How many pictures stay.

    Attributes:
      per_subject: of one subject in one language; more frequent subjects are thinned out to it.
      per_language: of one language; its subjects are cut at the level that leaves no more.
      seed: decides which stay.
    """

    per_subject: int | None = None
    per_language: int | None = None
    seed: int = 0


def balanced(job: Job, source: str, balance: Balance) -> Iterator[Outcome]:
    """Thins out frequent subjects, as MetaCLIP (Xu et al. 2024) does its entries, and then frequent languages.

    A row's place within its language and subject is drawn from its id and the seed; those beyond the
    threshold of their kind go.
    """
    drawn: dict[tuple[str, str], list[bytes]] = defaultdict(list)
    for row in job.read_all(source):
        drawn[row["language"], row["subject"]].append(_draw(row["id"], balance.seed))
    cells = {cell: len(ranks) for cell, ranks in drawn.items()}
    limits = thresholds(cells, balance)
    last = {cell: heapq.nsmallest(limits[cell], ranks)[-1:] for cell, ranks in drawn.items()}
    subject_limit = balance.per_subject
    for row in job.read_all(source):
        cell = row["language"], row["subject"]
        if limits[cell] and _draw(row["id"], balance.seed) <= last[cell][0]:
            yield Passed(row)
        else:
            of_subject = limits[cell] == subject_limit
            reason = "subject is frequent" if of_subject else "language is frequent"
            yield Dropped(row["id"], "balance", reason)


def thresholds(
    cells: Mapping[tuple[str, str], int], balance: Balance
) -> dict[tuple[str, str], int]:
    """(language, subject) -> how many stay of so many.

    >>> thresholds({("a", "x"): 9, ("a", "y"): 2, ("b", "x"): 3}, Balance(per_subject=6, per_language=6))
    {('a', 'x'): 4, ('a', 'y'): 2, ('b', 'x'): 3}
    """
    of_language: dict[str, list[int]] = defaultdict(list)
    for (code, _), count in cells.items():
        of_language[code].append(count)
    levels = {code: _level(counts, balance) for code, counts in of_language.items()}
    return {cell: min(count, levels[cell[0]]) for cell, count in cells.items()}


def _level(counts: Sequence[int], balance: Balance) -> int:
    """The highest cut that leaves at most `per_subject` each and `per_language` together."""
    most = max(counts) if balance.per_subject is None else min(max(counts), balance.per_subject)
    if balance.per_language is None:
        return most
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(count, middle) for count in counts) <= balance.per_language:
            low = middle
        else:
            high = middle - 1
    return low


def _draw(id: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=12).digest()


def share(id: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that the id decides."""
    return int.from_bytes(_draw(f"{purpose}/{id}", seed)[:7], "big") / 2**56
