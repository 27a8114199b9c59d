"""Thins out frequent subjects and languages, as MetaCLIP does with its entries (Xu et al. 2024)."""

import bisect
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
      per_subject: maximum number of pictures of one subject in one language; None: no limit.
      per_language: maximum number of one language, taken from its most frequent subjects first; None: no limit.
      seed: decides which pictures stay.
    """

    per_subject: int | None = None
    per_language: int | None = None
    seed: int = 0


def balanced(job: Job, source: str, balance: Balance) -> Iterator[Outcome]:
    """Passes the rows of a part that stay. Id and seed decide a row's rank in its language and subject."""
    drawn: dict[tuple[str, str], list[bytes]] = defaultdict(list)
    for row in job.read_all(source):
        drawn[row["language"], row["subject"]].append(_draw(row["id"], balance.seed))
    cells = {cell: len(ranks) for cell, ranks in drawn.items()}
    limits = thresholds(cells, balance)
    last = {cell: heapq.nsmallest(limits[cell], ranks)[-1:] for cell, ranks in drawn.items()}
    for row in job.read_all(source):
        cell = row["language"], row["subject"]
        if limits[cell] and _draw(row["id"], balance.seed) <= last[cell][0]:
            yield Passed(row)
        else:
            frequent = "subject" if limits[cell] == balance.per_subject else "language"
            yield Dropped(row["id"], "balance", f"{frequent} is frequent")


def thresholds(
    cells: Mapping[tuple[str, str], int], balance: Balance
) -> dict[tuple[str, str], int]:
    """(language, subject) -> the number of pictures that stay, given the numbers that there are.

    >>> thresholds({("a", "x"): 9, ("a", "y"): 2, ("b", "x"): 3}, Balance(per_subject=6, per_language=6))
    {('a', 'x'): 4, ('a', 'y'): 2, ('b', 'x'): 3}
    """
    of_language: dict[str, list[int]] = defaultdict(list)
    for (code, _), count in cells.items():
        of_language[code].append(count)
    levels = {code: _level(counts, balance) for code, counts in of_language.items()}
    return {cell: min(count, levels[cell[0]]) for cell, count in cells.items()}


def _level(counts: Sequence[int], balance: Balance) -> int:
    """The highest limit for each subject that keeps at most `per_subject` of each and `per_language` in all."""
    most = max(counts) if balance.per_subject is None else min(max(counts), balance.per_subject)
    if balance.per_language is None:
        return most

    def kept(limit: int) -> int:
        return sum(min(count, limit) for count in counts)

    return bisect.bisect_right(range(1, most + 1), balance.per_language, key=kept)


def _draw(id: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=12).digest()


def share(id: str, seed: int, purpose: str) -> float:
    """A random number in [0, 1), decided by id, seed and purpose."""
    return int.from_bytes(_draw(f"{purpose}/{id}", seed)[:7], "big") / 2**56
