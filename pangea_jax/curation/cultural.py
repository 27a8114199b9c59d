"""Instructions about pictures of many cultures, from image/alt-text pairs of the web (paper, section 2.2).

    filter      reads the pairs; checks size, aspect, length, NSFW tag, offensive words, language, CLIP score
    unique      drops repeated ids, similar alt texts and similar pictures
    score       a model reads the alt text and names quality, subject and country; drops bad texts and those
                without a country
    balance     thins out frequent subjects and languages
    fetch       fetches the pictures of which only the address is known
    fetched     drops similar pictures among the fetched ones
    records     a model describes each picture in the language of the alt text and writes two instructions

Alt texts and the model's answers are data: they are checked and put into prompts and records, but never followed or
run. The paper does not publish its list of offensive words, its thresholds of similarity, its CLIP model or the
numbers of the balance; our values are in configs/curation/cultural.py.
"""

import dataclasses
import functools
import hashlib
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pangea_jax import languages
from pangea_jax.curation import image_text, llm, near_duplicates, workflow
from pangea_jax.curation.accounting import Dropped, Entered, Outcome, Passed, provenance
from pangea_jax.curation.balance import Balance, balanced
from pangea_jax.curation.filters import (
    ClipScorer,
    FilterConfig,
    Filters,
    Scorer,
    language_code,
)
from pangea_jax.curation.image_scores import ScoreAltTexts
from pangea_jax.curation.image_text import Fault, Pair, Part, Place
from pangea_jax.curation.instructions import CATEGORY, MakeInstructions
from pangea_jax.curation.prompts import PROMPTS
from pangea_jax.curation.web import Fetch, FetchError
from pangea_jax.curation.workflow import Job
from pangea_jax.data import image
from pangea_jax.data.record import identify_language
from pangea_jax.work import runners
from pangea_jax.work.atomic import write_bytes
from pangea_jax.work.restart import WorkError

STAGES = (
    *("read", "filters", "language", "pictures", "CLIP score", "near-duplicates"),
    *("scoring", "quality", "country", "balance", "accessible", "alike when fetched"),
    *("recaption", "captions kept", "instructions", "checks"),
)
PARTS = ("filter", "unique", "score", "balance", "fetch", "fetched", workflow.RECORDS)
PUBLISHED = {
    "read": "10M pairs sampled from LAION-Multi",
    "quality": "below 4 of 5 dropped",
    "country": "about 60 % have no specific country",
    "accessible": "30 % lost; 1M pictures remain",
    "captions kept": "300K captions are in the release",
    "instructions": "up to two pairs a picture; 1.5M samples in all",
}
NO_LANGUAGE = "language is not identified or not wanted"

_SCORER_BATCH = 64


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """When two rows are too similar.

    Attributes:
      min_text_similarity: minimum estimated Jaccard similarity of the alt texts' 4-grams; None: texts are not compared.
      max_hash_distance: maximum number of bits, of 64, in which the pictures' hashes differ.
    """

    min_text_similarity: float | None = near_duplicates.MIN_TEXT_SIMILARITY
    max_hash_distance: int = near_duplicates.MAX_HASH_DISTANCE


@dataclasses.dataclass(frozen=True)
class CulturalConfig:
    """The source, the filters and the models.

    Attributes:
      llm: the model that describes pictures and writes instructions. Its limits count for both models.
      scoring_llm: the model that reads the alt texts.
      source: folder of Parquet files of LAION or the Hub, or of tar files of img2dataset.
      name: the source of the records is cultural/<name>.
      seed: decides the variants of prompts and the places of markers.
      shard_size: number of rows of a shard.
      languages: tags of the languages that may pass; (): the 39 of PangeaIns.
      blocked_words: file of offensive words and phrases, one per line; "": none.
      clip_model: name or folder of a two-tower model of transformers, which scores the available pictures;
        "": the source's own `similarity` is used.
      caption_share: share of the pictures whose caption also becomes a record.
      picture_side: maximum side in pixels of the pictures that the model sees.
    """

    llm: llm.ClientConfig
    scoring_llm: llm.ModelConfig
    source: str = "data/laion-multi"
    name: str = "laion-multi"
    seed: int = 0
    shard_size: int = 256
    languages: tuple[str, ...] = ()
    blocked_words: str = ""
    filters: FilterConfig = FilterConfig()
    clip_model: str = ""
    near_duplicates: NearDuplicates = NearDuplicates()
    balance: Balance = Balance()
    fetch: Fetch = Fetch()
    caption_share: float = 0.3
    picture_side: int = 1024


def run(
    config: CulturalConfig,
    out: Path,
    runner_options: Sequence[str],
    *,
    scorer: Callable[[], Scorer] | None = None,
) -> dict[str, Any]:
    """Makes cultural instructions, or continues to.

    Args:
      out: folder of the results, see `pangea_jax.curation.workflow`.
      runner_options: options of Beam.
      scorer: makes the scorer of pictures and texts, instead of `config.clip_model`; picklable.

    Returns:
      the contents of report.json.

    Raises:
      reply_store.Stop: the budget is spent or the endpoint does not answer; the same call continues.
      WorkError, ValueError: the source, the folder or a setting cannot be used.
    """
    job, filters = Job(out, STAGES, config.shard_size), _filters(config)
    source = Path(config.source)
    if not source.exists():
        raise WorkError(f"config.source={source}: no such file or folder")
    if scorer is None and config.clip_model:
        scorer = functools.partial(_clip_scorer, config.clip_model)
    alike = config.near_duplicates
    score = ScoreAltTexts(_scoring_model(config), job.replies)
    parts = image_text.find_parts(source)
    beam = runners.Beam(runner_options)
    with job.started(_plan(config, filters, parts)):
        sources = dataclasses.replace(job, shard_size=1)
        sources.split("sources", (Passed(part._asdict()) for part in parts))
        job.map(beam, "filter", "sources", FilterPairs(out, filters, scorer))
        job.split("unique", unique(job, "filter", "near-duplicates", alike), source="filter")
        job.map(beam, "score", "unique", score)
        job.split("balance", balanced(job, "score", config.balance), source="score")
        job.map(beam, "fetch", "balance", FetchPictures(out, filters, config.fetch))
        # The alt texts have been compared already.
        alike = dataclasses.replace(alike, min_text_similarity=None)
        job.split("fetched", unique(job, "fetch", "alike when fetched", alike), source="fetch")
        job.map(beam, workflow.RECORDS, "fetched", _make_instructions(config, job))
        return job.report(
            PARTS,
            title="Cultural instructions from image/alt-text pairs",
            published=PUBLISHED,
            sections=_sections(out),
            usage=llm.client(config.llm, job.replies).usage(),
        )


def _make_instructions(config: CulturalConfig, job: Job) -> MakeInstructions:
    return MakeInstructions(
        llm=config.llm,
        job=job,
        source=f"{CATEGORY}/{config.name}",
        scoring_model=config.scoring_llm.model,
        caption_share=config.caption_share,
        side=config.picture_side,
        seed=config.seed,
    )


def _scoring_model(config: CulturalConfig) -> llm.ClientConfig:
    """The scoring model with the limits of `config.llm`, which are kept with the replies of both."""
    main, scoring = config.llm, config.scoring_llm
    is_free = scoring.price_in + scoring.price_out == 0
    return llm.ClientConfig(
        **dataclasses.asdict(scoring),
        budget=None if is_free else main.budget,
        max_calls=main.max_calls,
        journal=main.journal,
    )


def _filters(config: CulturalConfig) -> Filters:
    blocked: frozenset[str] = frozenset()
    if config.blocked_words:
        lines = Path(config.blocked_words).read_text(encoding="utf-8").splitlines()
        entries = (line.strip() for line in lines)
        blocked = frozenset(entry for entry in entries if entry and not entry.startswith("#"))
    rules = dataclasses.asdict(config.filters)
    rules["nsfw"] = tuple(tag.upper() for tag in workflow.split_names(config.filters.nsfw))
    wanted = workflow.language_codes(config.languages) or languages.PANGEAINS
    return Filters(**rules, languages=wanted, blocked=blocked)


def _plan(config: CulturalConfig, filters: Filters, parts: Sequence[Part]) -> dict[str, Any]:
    paths = [Path(path) for path in dict.fromkeys(part.path for part in parts)]
    plan = workflow.plan(config, paths) | {"prompts": PROMPTS}
    plan["blocked_words"] = hashlib.sha256("\n".join(sorted(filters.blocked)).encode()).hexdigest()
    for name in ("max_bytes", "browser"):  # not in the plans of earlier versions
        del plan["fetch"][name]
    return plan


@functools.cache
def _clip_scorer(name: str) -> Scorer:
    return ClipScorer(name)


@dataclasses.dataclass
class _Looked:
    """A pair that passes all rules before the score: its picture (None if it must be fetched), language and score."""

    pair: Pair
    picture: Image.Image | None
    language: str
    similarity: float | None


@dataclasses.dataclass(frozen=True)
class FilterPairs:
    """Reads parts of the source and keeps the pairs that pass all rules.

    Attributes:
      out: folder of the job; pictures that are not in a file are written there.
      scorer: makes the scorer of pictures and texts; None: the source's own similarity is used.
    """

    out: Path
    filters: Filters
    scorer: Callable[[], Scorer] | None = None

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        for row in rows:
            count = 0
            for some in near_duplicates.batched(image_text.read(Part(**row)), _SCORER_BATCH):
                count += len(some)
                # Pillow's warnings are not needed: a picture that cannot be used is dropped with a reason.
                with warnings.catch_warnings(action="ignore"):
                    outcomes = list(self._outcomes(some))
                yield from outcomes
            yield Entered(count)

    def _outcomes(self, pairs: Sequence[Pair | Fault]) -> Iterator[Outcome]:
        looked = [self._look(pair) for pair in pairs]
        seen = [some for some in looked if isinstance(some, _Looked) and some.picture]
        if self.scorer is not None and seen:
            scores = self.scorer()([s.picture for s in seen], [s.pair.text for s in seen])
            for some, score in zip(seen, np.asarray(scores, float).tolist(), strict=True):
                some.similarity = score
        for some in looked:
            yield some if isinstance(some, Dropped) else self._judged(some)

    def _look(self, pair: Pair | Fault) -> Dropped | _Looked:
        if isinstance(pair, Fault):
            return Dropped(pair.id, "read", pair.reason)
        reason = self.filters.reason(pair)
        if reason:
            return Dropped(pair.id, "filters", reason)
        code = language_code(pair.language or identify_language(pair.text) or "")
        if code is None or code not in (self.filters.languages or languages.LANGUAGES):
            return Dropped(pair.id, "language", NO_LANGUAGE)
        if pair.encoded is None:
            return _Looked(pair, None, code, pair.similarity)
        try:
            picture, _ = image.preview(pair.encoded, name=pair.id)
        except image.ImageError as error:
            return Dropped(pair.id, "pictures", error.fault, error.reason)
        return _Looked(pair, picture, code, pair.similarity)

    def _judged(self, found: _Looked) -> Dropped | Passed:
        pair, least = found.pair, self.filters.min_similarity
        if least is not None and found.similarity is None:
            return Dropped(pair.id, "CLIP score", "no CLIP score")
        if least is not None and not found.similarity > least:  # also if it is NaN
            return Dropped(pair.id, "CLIP score", "CLIP score is too low")
        row = {"id": pair.id, "text": pair.text, "url": pair.url, "language": found.language}
        row |= {"nsfw": pair.nsfw, "similarity": found.similarity, "place": None, "hash": None}
        if found.picture is not None:
            place = pair.place or keep_picture(self.out, pair.encoded)
            row |= _picture_row(place, found.picture, pair.encoded)
        return Passed(row)


def keep_picture(out: Path, encoded: bytes) -> Place:
    """Writes a picture into the job's folder; its name is its checksum."""
    name = hashlib.sha256(encoded).hexdigest()
    path = Path("work", "pictures", name[:2], name)
    if not (out / path).is_file():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out / path, encoded)
    return Place(path.as_posix(), 0, len(encoded))


def _picture_row(place: Place, picture: Image.Image, encoded: bytes) -> dict[str, Any]:
    """The fields of a row that describe its picture."""
    size = image.header_size(encoded)
    return {"place": place, "size": size, "hash": near_duplicates.perceptual_hash(picture)}


def unique(job: Job, source: str, stage: str, alike: NearDuplicates) -> Iterator[Outcome]:
    """Passes the rows of a part that are not too similar to an earlier one.

    The hashes are held in memory: about 1 GB for a million rows.
    """
    reasons: list[str | None] = []
    numbers, hashes = [], []
    seen: set[bytes] = set()
    least, new = alike.min_text_similarity, itertools.repeat(True)
    if least is not None:
        texts = (row["text"] for row in job.read_all(source))
        new = near_duplicates.unlike_earlier_texts(texts, least)
    for row, is_new in zip(job.read_all(source), new, strict=False):
        key = hashlib.blake2b(row["id"].encode(), digest_size=12).digest()
        reason = None if is_new else "alt text is like another"
        reasons.append("id is taken" if key in seen else reason)
        seen.add(key)
        if reasons[-1] is None and row["hash"] is not None:
            numbers.append(len(reasons) - 1)
            hashes.append(row["hash"])
    stays = near_duplicates.unlike_earlier_pictures(
        np.array(hashes, np.uint64), alike.max_hash_distance
    )
    for number in np.array(numbers, int)[~stays].tolist():
        reasons[number] = "picture is like another"
    for reason, row in zip(reasons, job.read_all(source), strict=True):
        yield Passed(row) if reason is None else Dropped(row["id"], stage, reason)


@dataclasses.dataclass(frozen=True)
class FetchPictures:
    """Fetches the missing pictures, and checks them as `FilterPairs` does."""

    out: Path
    filters: Filters
    fetch: Fetch
    concurrency: int = 32

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        with (
            warnings.catch_warnings(action="ignore"),
            futures.ThreadPoolExecutor(self.concurrency) as pool,
        ):
            yield from pool.map(self._outcome, rows)

    def _outcome(self, row: Mapping[str, Any]) -> Outcome:
        if row["place"] is not None:
            return Passed(row)
        try:
            encoded = self.fetch(row["url"])
            reason = self.filters.reason_of_size(encoded)
            if reason:
                return Dropped(row["id"], "accessible", reason)
            picture, _ = image.preview(encoded, name=row["id"])
        except FetchError as error:
            return Dropped(row["id"], "accessible", str(error), row["url"][:200])
        except image.ImageError as error:
            return Dropped(row["id"], "accessible", error.fault, error.reason)
        return Passed({**row, **_picture_row(keep_picture(self.out, encoded), picture, encoded)})


def _sections(out: Path) -> dict[str, dict[str, Any]]:
    """Counts the records by language, subject, country and task type."""
    counts = {
        name: Counter() for name in ("Languages", "Subjects", "Countries", "Task types", "Pairs")
    }
    for row in provenance(out):
        counts["Languages"][row["language"]] += 1
        counts["Subjects"][row["subject"]] += 1
        counts["Countries"][row["country"]] += 1
        counts["Task types"].update(row["task_types"])
        if "dropped_pairs" in row:
            counts["Pairs"][f"records of {len(row['task_types'])}"] += 1
            counts["Pairs"].update(f"dropped: {why}" for why in row["dropped_pairs"])
    counts["Countries"] = Counter(dict(counts["Countries"].most_common(40)))
    return {name: dict(found.most_common()) for name, found in counts.items()}
