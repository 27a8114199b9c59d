"""Selects training examples, and how often each is used, from the index alone.

The ablations use it. Fields of `Mixture` for the three ablations of the paper:

    share of English (section 5, Figure 6)   en_ratio and design
    popularity of a language (Figure 7)      language_alpha or weights, and rotate
    number of samples (Figure 5)             num_examples; for one seed, smaller sets are subsets
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int, Int32

from pangea_jax import languages as language_table
from pangea_jax.work import paths

DESIGNS = ("fixed_total", "fixed_multilingual")
# Fields that are tuples of names.
_NAMES = (
    "languages",
    "sources",
    "categories",
    "exclude_sources",
    "exclude_categories",
    "exclude_ids",
)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The examples to draw. The natural mixture is `Mixture(None, language_alpha=1.0, text_ratio=None)`.

    Attributes:
      num_examples: the total, see `design`; None: as many as there are records, `epochs` times.
      epochs: passes over the records, if `num_examples` is None. Their examples are shuffled together.
      en_ratio: share of English in [0, 1]; None treats English like any other language.
      languages: canonical codes to draw from; None means all in the index.
      sources: record sources to draw from, with `*` and `?` as in file names; None means all. If
        `text_ratio` is a number, this applies only to records with images.
      text_ratio: share of text-only records within every language; None keeps the natural share.
      max_repeat: how often one record may be drawn; more is an error.
      language_alpha: the share of a language with n records is proportional to n ** alpha: 1 is
        natural, 0 is uniform (the default).
      weights: shares of the languages by code, in any unit; replaces `language_alpha`.
      rotate: language i gets the share of language i + rotate, so that the effects of share and
        language can be separated. If `en_ratio` is set, English keeps its share.
      design: "fixed_total": more English means fewer examples of the others, so their scores mostly
        depend on their own numbers. "fixed_multilingual": `num_examples` counts only the others,
        which do not change when English is added; then scores change by transfer or interference.
      categories: record categories to draw from, with `*` and `?`; None means all.
      exclude_sources, exclude_categories: not drawn from, with `*` and `?`.
      exclude_ids: ids to leave out, such as those of an evaluation dataset, see `read_ids`.
    """

    num_examples: int | None
    en_ratio: float | None = None
    languages: tuple[str, ...] | None = None
    sources: tuple[str, ...] | None = None
    text_ratio: float | None = 0.0
    max_repeat: float = 100.0
    language_alpha: float | None = None
    weights: Mapping[str, float] | None = None
    rotate: int = 0
    design: str = "fixed_total"
    categories: tuple[str, ...] | None = None
    exclude_sources: tuple[str, ...] = ()
    exclude_categories: tuple[str, ...] = ()
    exclude_ids: tuple[str, ...] = ()
    epochs: int = 1

    def __post_init__(self):
        for name in _NAMES:
            names = getattr(self, name)
            if isinstance(names, str):  # would become a tuple of letters
                raise ValueError(f"mixture.{name} must be a tuple of names, not {names!r}")
            # On a command line, `ocr,cultural` becomes one name, and no record has it.
            joined = [n for n in names or () if "," in n] if name != "exclude_ids" else []
            if joined:
                raise ValueError(
                    f"mixture.{name}: {joined[0]!r} is one name; write {tuple(joined[0].split(','))}. "
                    "If a name contains a comma, write `?` in its place"
                )
        if self.languages is not None:
            codes = tuple(_code("languages", tag) for tag in self.languages)
            object.__setattr__(self, "languages", codes)
            if len(set(codes)) != len(codes):
                raise ValueError(f"mixture.languages names a language twice: {codes}")
            self._check_english(codes)
        if self.weights is not None:
            weights = {_code("weights", tag): w for tag, w in self.weights.items()}
            object.__setattr__(self, "weights", weights)
            if not weights or min(weights.values()) < 0 or not sum(weights.values()) > 0:
                raise ValueError(f"mixture.weights must be positive, not {weights}")
            if self.language_alpha is not None:
                raise ValueError("mixture.language_alpha and mixture.weights exclude each other")
        if self.en_ratio is not None and not 0 <= self.en_ratio <= 1:
            raise ValueError(f"mixture.en_ratio must be in [0, 1], not {self.en_ratio}")
        if self.text_ratio is not None and not 0 <= self.text_ratio <= 1:
            raise ValueError(f"mixture.text_ratio must be in [0, 1], not {self.text_ratio}")
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(f"mixture.num_examples must be positive, not {self.num_examples}")
        if self.epochs < 1 or (self.epochs > 1 and self.num_examples is not None):
            raise ValueError(
                f"mixture.epochs is {self.epochs}; expected 1 or more, and 1 beside num_examples"
            )
        if self.design not in DESIGNS:
            raise ValueError(f"mixture.design {self.design!r} is not one of {DESIGNS}")
        if self.design == "fixed_multilingual" and (self.en_ratio is None or self.en_ratio == 1):
            raise ValueError(
                'mixture.design="fixed_multilingual" adds English to the examples of the others: '
                f"en_ratio must be in [0, 1), not {self.en_ratio}"
            )

    def _check_english(self, codes):
        if self.en_ratio and "en" not in codes:
            raise ValueError(f"mixture.en_ratio is {self.en_ratio}, but English is not in {codes}")
        if self.en_ratio is not None and self.en_ratio < 1 and set(codes) <= {"en"}:
            raise ValueError(
                f"mixture.en_ratio is {self.en_ratio}, but English is the only language"
            )


def _code(field: str, tag: str) -> str:
    if tag == language_table.UNDETERMINED:
        return tag
    try:
        return language_table.get(tag).code
    except KeyError as error:
        raise ValueError(f"mixture.{field}: {error.args[0]}") from None


@dataclasses.dataclass(frozen=True)
class Choice:
    """The drawn rows of the index (grouped, not shuffled), and the resulting counts.

    Attributes:
      repeat_factor: drawn examples per available record, by `language/kind`.
      held_back: rows of the index for validation; None if none are held back.
      dropped: number of records on neither side, because they show a picture of validation.
    """

    rows: Int[np.ndarray, " num_examples"]
    examples_per_language: dict[str, int]
    kinds: dict[str, int]
    repeat_factor: dict[str, float]
    examples_per_source: dict[str, int] = dataclasses.field(default_factory=dict)
    held_back: Int[np.ndarray, " held_back"] | None = None
    dropped: int = 0

    def summary(self) -> dict:
        held = {} if self.held_back is None else {"held_back": len(self.held_back)}
        held |= {"dropped_beside_held_back": self.dropped} if self.dropped else {}
        return held | {
            "num_examples": len(self.rows),
            "examples_per_language": self.examples_per_language,
            "examples_per_source": self.examples_per_source,
            "kinds": self.kinds,
            "repeat_factor": self.repeat_factor,
        }


def read_ids(path: str | Path) -> tuple[str, ...]:
    """Reads ids for `Mixture.exclude_ids`, one per line; skips blank lines and `#` comments."""
    lines = paths.path(path).read_text(encoding="utf-8").splitlines()
    ids = (line.strip() for line in lines)
    return tuple(id for id in ids if id and not id.startswith("#"))


def column_codes(index: pa.Table, name: str) -> tuple[Int32[np.ndarray, " n"], list[str]]:
    """A column of labels as (codes, labels); the code -1 means no label.

    It takes a few bytes per row. Python strings of millions of rows would take gigabytes.
    """
    column = index[name]
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column)
    column = pa.chunked_array(column.unify_dictionaries().chunks, type=column.type)
    if column.num_chunks == 0:
        return np.zeros(0, np.int32), []
    codes = np.concatenate([c.indices.fill_null(-1).to_numpy() for c in column.chunks])
    return codes.astype(np.int32), column.chunk(0).dictionary.to_pylist()


def shares(mixture: Mixture, available: Mapping[str, int] | None = None) -> dict[str, float]:
    """Each language's share of the examples; they sum to 1.

    Args:
      available: number of records per language, for `language_alpha`.
    """
    codes = mixture.languages or tuple(sorted(available))
    apart = mixture.en_ratio is not None
    others = [code for code in codes if not (apart and code == "en")]
    if mixture.weights is not None:
        raw = np.array([mixture.weights.get(code, 0.0) for code in others], np.float64)
    else:
        raw = np.array([(available or {}).get(code, 0) for code in others], np.float64)
        with np.errstate(over="ignore"):
            raw = np.where(raw > 0, raw, 1) ** (mixture.language_alpha or 0.0)
    if not np.isfinite(raw.sum()):
        raise ValueError(
            f"mixture.{'language_alpha' if mixture.weights is None else 'weights'} gives no finite "
            f"shares: {dict(zip(others, raw.tolist(), strict=True))}"
        )
    if raw.sum() == 0 and not (apart and mixture.en_ratio == 1):
        raise ValueError(f"mixture.weights gives no share to any of {others}")
    raw = np.roll(raw, -mixture.rotate)
    rest = (1 - mixture.en_ratio if apart else 1.0) / (raw.sum() or 1.0)
    table = dict(zip(others, (raw * rest).tolist(), strict=True))
    return ({"en": mixture.en_ratio} if apart and "en" in codes else {}) | table


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Integers in proportion to `shares` with the sum `total`; none shrinks when `total` grows.

    This is Webster's method: it rounds to the nearest integer, with a common divisor that gives the
    right sum. Among equal shares, the first gets the extra example.

    >>> apportion(10, [0.4, 0.2, 0.2, 0.2])
    [4, 2, 2, 2]
    >>> apportion(10, [0.55, 0.25, 0.2])
    [6, 2, 2]
    """
    shares = np.asarray(shares, np.float64) / np.sum(shares)
    counts = np.floor(shares * total + 0.5).astype(np.int64)
    with np.errstate(divide="ignore"):
        # Rounding removes float errors, so that equal claims are equal.
        while counts.sum() < total:
            counts[np.argmax(np.round(shares * total / (counts + 0.5), 9))] += 1
        while counts.sum() > total:
            claims = np.round(shares * total / (counts - 0.5), 9)
            claims[counts == 0] = np.inf
            counts[len(counts) - 1 - np.argmin(claims[::-1])] -= 1
    return counts.tolist()


def counts(mixture: Mixture, total: int, available: Mapping[str, int]) -> dict[str, int]:
    """Examples per language. The share of English is kept to the nearest whole example.

    Args:
      total: `mixture.num_examples`, or the number of available records.
      available: number of records per language.
    """
    table = shares(mixture, available)
    if mixture.en_ratio is None:
        return dict(zip(table, apportion(total, list(table.values())), strict=True))
    ratio = mixture.en_ratio
    if mixture.design == "fixed_multilingual":
        english, others = math.floor(total * ratio / (1 - ratio) + 0.5 + 1e-9), total
    else:
        english = math.floor(total * ratio + 0.5 + 1e-9)
        others = total - english
    rest = {code: share for code, share in table.items() if code != "en"}
    found = dict(zip(rest, apportion(others, list(rest.values())), strict=True)) if others else {}
    result = {code: found.get(code, 0) for code in rest}
    return ({"en": english} if "en" in table else {}) | result


def usable(index: pa.Table, mixture: Mixture) -> Bool[np.ndarray, " n"]:
    """A mask of the rows that the mixture may draw."""
    drawn = np.any(list(_pools(index, mixture).values()), axis=0)
    if mixture.languages is not None:
        language, codes = column_codes(index, "language")
        drawn &= np.array([*(code in mixture.languages for code in codes), False], bool)[language]
    return drawn


def choose(
    index: pa.Table,
    mixture: Mixture,
    seed: int = 0,
    *,
    left_out: Bool[np.ndarray, " n"] | None = None,
) -> Choice:
    """Draws exactly the numbers of rows that the mixture asks for.

    The order of the records of a language depends only on the seed. So a smaller total draws a
    subset. When all records of a language have been drawn, they are drawn again in a new order.

    Args:
      index: the store's index, with the columns `language`, `kind` and `source`, and with
        `category` and `id` if the mixture names any. If it has `source_language`, text records that
        translate from a language outside the mixture are left out.
      left_out: a mask of rows that are not drawn, such as those of `pangea_jax.data.holdout`.

    Raises:
      ValueError: a language has no record of a requested kind, or its records would repeat more
        than `max_repeat` times.
    """
    language, codes = column_codes(index, "language")
    pools = _pools(index, mixture)
    if left_out is not None:
        pools = {kind: mask & ~left_out for kind, mask in pools.items()}
    drawable = np.any(list(pools.values()), axis=0)
    found = np.bincount(language[drawable & (language >= 0)], minlength=len(codes))
    available = {code: int(n) for code, n in zip(codes, found, strict=True) if n}
    if not available:
        raise ValueError(f"mixture: no records from {_described(mixture)}")
    weighted = {code for code, weight in (mixture.weights or {}).items() if weight}
    wanted = mixture.languages or tuple(sorted(available.keys() | weighted))
    mixture._check_english(wanted)
    everything = mixture.epochs * sum(available.get(code, 0) for code in wanted)
    total = mixture.num_examples or everything
    per_language = counts(dataclasses.replace(mixture, languages=wanted), total, available)
    rows, repeats = [], {}
    for code, examples in per_language.items():
        here = language == (codes.index(code) if code in codes else -2)
        for kind, count in _by_kind(examples, mixture.text_ratio).items():
            if not count:
                continue
            pool = np.flatnonzero(pools[kind] & here)
            _check_pool(pool, count, kind, code, mixture)
            repeats[f"{code}/{kind}"] = round(count / len(pool), 3)
            # "und" comes last, so that it does not change the seeds of the languages.
            number = [*sorted(language_table.LANGUAGES), language_table.UNDETERMINED].index(code)
            rows.append(_draw(pool, count, (seed, number, _KINDS.index(kind))))
    rows = np.concatenate(rows)
    kinds = {"image": 0, "text": 0} | _count(index, "kind", rows)
    per_source = dict(sorted(_count(index, "source", rows).items()))
    return Choice(rows, per_language, kinds, repeats, per_source)


_KINDS = ("image", "text", "all")  # the order is part of the seed


def _by_kind(examples: int, text_ratio: float | None) -> dict[str, int]:
    if text_ratio is None:
        return {"all": examples}
    num_text = round(examples * text_ratio)
    return {"image": examples - num_text, "text": num_text}


def _pools(index: pa.Table, mixture: Mixture) -> dict[str, Bool[np.ndarray, " n"]]:
    """For each kind, a mask of the rows that may be drawn."""
    kind, kinds = column_codes(index, "kind")
    is_text = kind == (kinds.index("text") if "text" in kinds else -2)
    everywhere = _matching(index, "category", mixture.categories, mixture.exclude_categories)
    everywhere &= _matching(index, "source", None, mixture.exclude_sources)
    if mixture.exclude_ids:
        left_out = pa.array(mixture.exclude_ids, index["id"].type)
        everywhere &= ~pc.is_in(index["id"], value_set=left_out).to_numpy()
    of_sources = _matching(index, "source", mixture.sources, ())
    within = ~is_text | _translates_within(index, mixture.languages)
    if mixture.text_ratio is None:
        return {"all": everywhere & of_sources & within}
    return {"image": everywhere & of_sources & ~is_text, "text": everywhere & is_text & within}


def _matching(index, name, wanted, unwanted) -> Bool[np.ndarray, " n"]:
    """A mask of rows whose label matches one of `wanted` (None: any) and none of `unwanted`."""
    if wanted is None and not unwanted:
        return np.ones(len(index), bool)
    codes, labels = column_codes(index, name)

    def matches(label, patterns):
        return any(fnmatch.fnmatchcase(label, pattern) for pattern in patterns)

    good = [
        (wanted is None or matches(label, wanted)) and not matches(label, unwanted)
        for label in (label or "" for label in labels)
    ]
    # A row without a label has code -1, so it gets the last entry.
    return np.array([*good, wanted is None], bool)[codes]


def _translates_within(index, codes) -> Bool[np.ndarray, " n"]:
    if "source_language" not in index.column_names or codes is None:
        return np.ones(len(index), bool)
    numbers, labels = column_codes(index, "source_language")
    return np.array([*(label in codes for label in labels), True], bool)[numbers]


def _check_pool(pool, count, kind, code, mixture):
    kind = "" if kind == "all" else f"{kind} "
    if not len(pool):
        raise ValueError(
            f"mixture: no {kind}records in language {code!r} from {_described(mixture)}"
        )
    if count > mixture.max_repeat * len(pool):
        raise ValueError(
            f"mixture: {count} {kind}examples in {code!r} repeat each of its {len(pool)} records "
            f"{count / len(pool):.1f} times, more than max_repeat={mixture.max_repeat}"
        )


def _described(mixture) -> str:
    text = f"sources {mixture.sources or 'of any name'}"
    if mixture.categories or mixture.exclude_categories or mixture.exclude_sources:
        text += f", categories {mixture.categories or 'of any name'} and the exclusions"
    return text


def _draw(pool, count, seed):
    """`count` rows from seeded permutations of the whole pool, one after the other."""
    rng = np.random.default_rng(seed)
    passes = -(-count // len(pool))
    return np.concatenate([rng.permutation(pool) for _ in range(passes)])[:count]


def _count(index, name, rows) -> dict[str, int]:
    codes, labels = column_codes(index, name)
    found = np.bincount(codes[rows], minlength=len(labels))
    return {label: int(n) for label, n in zip(labels, found, strict=True) if n}
