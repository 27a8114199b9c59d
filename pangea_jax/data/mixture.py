"""Which examples are trained on, and how often: the engine of the ablations, from the index alone.

The paper's English-share ablation (section 5, Figure 6) fixes the total and divides what English
leaves evenly among the other languages; so does `Mixture`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from pangea_jax import languages as language_table


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What to draw.

    Attributes:
      num_examples: the fixed total.
      en_ratio: share of English in [0, 1]; None leaves every language the same share.
      languages: canonical codes to draw from.
      sources: record sources to draw pictured records from; text-only records have no artist.
      text_ratio: share of text-only records within every language.
      max_repeat: how often one record may be drawn before this is an error, not a mixture.
      seed: decides which records are drawn. For one seed a smaller total draws a subset.
    """

    num_examples: int
    en_ratio: float | None
    languages: tuple[str, ...]
    sources: tuple[str, ...]
    text_ratio: float = 0.0
    max_repeat: float = 100.0
    seed: int = 0

    def __post_init__(self):
        codes = tuple(language_table.get(tag).code for tag in self.languages)
        object.__setattr__(self, "languages", codes)
        if len(set(codes)) != len(codes):
            raise ValueError(f"mixture.languages names a language twice: {codes}")
        if self.en_ratio is not None and not 0 <= self.en_ratio <= 1:
            raise ValueError(f"mixture.en_ratio must lie in [0, 1], not {self.en_ratio}")
        if not 0 <= self.text_ratio <= 1:
            raise ValueError(f"mixture.text_ratio must lie in [0, 1], not {self.text_ratio}")
        if self.num_examples < 1:
            raise ValueError(f"mixture.num_examples must be positive, not {self.num_examples}")
        if self.en_ratio and "en" not in codes:
            raise ValueError(f"mixture.en_ratio is {self.en_ratio}, but English is not in {codes}")
        if self.en_ratio is not None and self.en_ratio < 1 and set(codes) <= {"en"}:
            raise ValueError(
                f"mixture.en_ratio is {self.en_ratio}, but English is the only language"
            )


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was drawn: rows of the index (grouped, not shuffled), and the realised counts."""

    rows: Int[np.ndarray, "num_examples"]
    examples_per_language: dict[str, int]
    kinds: dict[str, int]
    repeat_factor: dict[str, float]

    def summary(self) -> dict:
        return {
            "num_examples": len(self.rows),
            "examples_per_language": self.examples_per_language,
            "kinds": self.kinds,
            "repeat_factor": self.repeat_factor,
        }


def shares(mixture: Mixture) -> dict[str, float]:
    """Each language's share of the examples; they sum to 1."""
    if mixture.en_ratio is None:
        return {code: 1 / len(mixture.languages) for code in mixture.languages}
    others = [code for code in mixture.languages if code != "en"]
    each = {code: (1 - mixture.en_ratio) / len(others) for code in others}
    return ({"en": mixture.en_ratio} if "en" in mixture.languages else {}) | each


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, each within one of its share (largest remainders first).

    >>> apportion(10, [0.4, 0.2, 0.2, 0.2])
    [4, 2, 2, 2]
    >>> apportion(10, [0.55, 0.25, 0.2])
    [6, 2, 2]
    """
    exact = np.asarray(shares, np.float64) * total
    floors = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-np.round(exact - floors, 9), kind="stable")
    floors[order[: total - floors.sum()]] += 1
    return floors.tolist()


def choose(index: pa.Table, mixture: Mixture) -> Choice:
    """Draws exactly `num_examples` rows of the index.

    Within a language the records are taken in an order that depends on the seed alone, again from
    the start when they run out.

    Args:
      index: the store's index, columns `language`, `kind`, `source`; where it has
        `source_language`, text records that translate from a language outside of the mixture are
        left out.

    Raises:
      ValueError: a language has no record of a kind asked for, or would repeat more than
        `max_repeat` times.
    """
    language, kind, source = (
        np.asarray(index[name].to_pylist()) for name in ("language", "kind", "source")
    )
    usable = {
        "image": (kind == "image") & np.isin(source, mixture.sources),
        "text": (kind == "text") & _translates_within(index, mixture.languages),
    }
    by_language = shares(mixture)
    totals = apportion(mixture.num_examples, list(by_language.values()))
    rows, repeats = [], {}
    kinds = {"image": 0, "text": 0}
    for code, total in zip(by_language, totals, strict=True):
        num_text = round(total * mixture.text_ratio)
        for name, count in (("image", total - num_text), ("text", num_text)):
            if not count:
                continue
            pool = np.flatnonzero(usable[name] & (language == code))
            if not len(pool):
                raise ValueError(
                    f"mixture: no {name} records in language {code!r} from sources {mixture.sources}"
                )
            repeats[f"{code}/{name}"] = round(count / len(pool), 3)
            if count > mixture.max_repeat * len(pool):
                raise ValueError(
                    f"mixture: {count} {name} examples in {code!r} repeat each of its {len(pool)} records "
                    f"{count / len(pool):.1f} times, more than max_repeat={mixture.max_repeat}"
                )
            rows.append(
                _draw(
                    pool,
                    count,
                    seed=(
                        mixture.seed,
                        sorted(language_table.LANGUAGES).index(code),
                        name == "text",
                    ),
                )
            )
            kinds[name] += count
    counts = dict(zip(by_language, totals, strict=True))
    return Choice(np.concatenate(rows), counts, kinds, repeats)


def _translates_within(index: pa.Table, codes: Sequence[str]) -> np.ndarray:
    if "source_language" not in index.column_names:
        return np.ones(len(index), bool)
    column = index["source_language"].to_pylist()
    return np.array([code is None or code in codes for code in column], bool)


def _draw(pool, count, seed):
    """`count` of `pool`: whole seeded permutations, one after the other."""
    rng = np.random.default_rng(seed)
    passes = -(-count // len(pool))
    return np.concatenate([rng.permutation(pool) for _ in range(passes)])[:count]
