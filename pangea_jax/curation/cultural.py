"""Instructions about pictures of many cultures, from image/alt-text pairs of the web (paper, section 2.2).

    filter      read; size, aspect, length, NSFW tag, offensive words, language, CLIP score
    unique      repeated ids, alike alt texts, alike pictures
    score       a model reads the alt text: quality, subject, country; poor and countryless ones go
    balance     frequent subjects and languages are thinned out
    fetch       pictures of which only the address is known
    fetched     alike pictures among those fetched
    records     recaptioned in the language of the alt text, two instructions made of it, checked

Alt texts and the model's answers are data: they are checked, put into prompts and records, and never
followed or run. Lists of offensive words, near-duplicate thresholds, the CLIP model and the numbers of the
balance are not published; ours are in configs/curation/cultural.py.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pangea_jax import languages
from pangea_jax.curation import image_text, llm, near_duplicates, workflow
from pangea_jax.curation.accounting import Dropped, Entered, Outcome, Passed
from pangea_jax.curation.balance import Balance, balanced
from pangea_jax.curation.filters import ClipScorer, Filters, Scorer, language_code
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
    """When rows are alike.

    Attributes:
      min_text_similarity: of alt texts, estimated Jaccard of their shingles; None: they are not compared.
      max_hash_distance: of pictures, in bits of 64.
    """

    min_text_similarity: float | None = near_duplicates.MIN_TEXT_SIMILARITY
    max_hash_distance: int = near_duplicates.MAX_HASH_DISTANCE


def run(
    config: Mapping[str, Any],
    out: Path,
    runner_options: Sequence[str],
    *,
    scorer: Callable[[], Scorer] | None = None,
) -> dict[str, Any]:
    """Makes cultural instructions, or goes on with making them.

    Args:
      config: see configs/curation/cultural.py.
      out: see `pipeline`.
      runner_options: of Beam.
      scorer: makes the scorer of pictures and texts, in place of `config.clip_model`; picklable.

    Returns:
      the contents of report.json.

    Raises:
      reply_store.Stop: the budget is spent or the endpoint gone; the same call goes on.
      workflow.JobError, ValueError: settings that cannot be carried out.
    """
    job, settings = Job(out, STAGES, config["shard_size"]), _Settings.of(config)
    source = Path(config["source"])
    if not source.exists():
        raise workflow.JobError(f"config.source={source}: no such file or folder")
    if scorer is None and config["clip_model"]:
        scorer = functools.partial(_clip_scorer, config["clip_model"])
    parts = image_text.find_parts(source)
    run_on = runners.Beam(runner_options)
    with job.started(_plan(config, settings.filters, parts)):
        sources = dataclasses.replace(job, shard_size=1)
        sources.split("sources", (Passed(part._asdict()) for part in parts))
        job.map(run_on, "filter", "sources", FilterPairs(out, settings.filters, scorer))
        _choose(job, run_on, settings)
        make = MakeInstructions(
            llm=settings.llm,
            replies=job.replies,
            out=out,
            source=f"{CATEGORY}/{config['name']}",
            scoring_model=settings.scoring_llm.model,
            caption_share=config["caption_share"],
            side=config["picture_side"],
            seed=config["seed"],
        )
        job.map(run_on, workflow.RECORDS, "fetched", make)
        return job.report(
            PARTS,
            title="Cultural instructions from image/alt-text pairs",
            published=PUBLISHED,
            sections=_sections(out, job.shards(workflow.RECORDS)),
            usage=llm.client(settings.llm, job.replies).usage(),
        )


def _choose(job: Job, run_on: runners.Run, settings: "_Settings") -> None:
    """The parts between reading the pairs and making the records: which pictures are worth it."""
    alike = settings.near_duplicates
    job.split("unique", unique(job, "filter", "near-duplicates", alike), source="filter")
    job.map(run_on, "score", "unique", ScoreAltTexts(settings.scoring_llm, job.replies))
    job.split("balance", balanced(job, "score", settings.balance), source="score")
    job.map(run_on, "fetch", "balance", FetchPictures(job.out, settings.filters, settings.fetch))
    # Their alt texts have been compared.
    alike = dataclasses.replace(alike, min_text_similarity=None)
    job.split("fetched", unique(job, "fetch", "alike when fetched", alike), source="fetch")


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The sections of the config."""

    filters: Filters
    near_duplicates: NearDuplicates
    balance: Balance
    fetch: Fetch
    llm: llm.ClientConfig
    scoring_llm: llm.ClientConfig

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_Settings":
        main = _section(config, "llm", llm.ClientConfig)
        # Both kinds of work draw on one budget, kept with the replies.
        shared = {"max_calls": main.max_calls, "journal": main.journal}
        scoring = _section(config, "scoring_llm", llm.ClientConfig, without=("budget", *shared))
        if scoring.price_in + scoring.price_out > 0:
            shared["budget"] = main.budget
        return cls(
            filters=_filters(config),
            near_duplicates=_section(config, "near_duplicates", NearDuplicates),
            balance=_section(config, "balance", Balance),
            fetch=_section(config, "fetch", Fetch),
            llm=main,
            scoring_llm=dataclasses.replace(scoring, **shared),
        )


def _filters(config: Mapping[str, Any]) -> Filters:
    blocked: frozenset[str] = frozenset()
    if config["blocked_words"]:
        lines = Path(config["blocked_words"]).read_text(encoding="utf-8").splitlines()
        entries = (line.strip() for line in lines)
        blocked = frozenset(entry for entry in entries if entry and not entry.startswith("#"))
    filters = _section(config, "filters", Filters, without=("languages", "blocked"))
    return dataclasses.replace(
        filters,
        nsfw=tuple(tag.upper() for tag in workflow.split_names(filters.nsfw)),
        languages=workflow.language_codes(config) or languages.PANGEAINS,
        blocked=blocked,
    )


def _section(config: Mapping[str, Any], name: str, kind: type, without: Sequence[str] = ()) -> Any:
    """A part of the config as the class that it describes.

    Raises:
      JobError: it has a key that the class has not.
    """
    values = workflow.plain(config[name])
    fields = {field.name for field in dataclasses.fields(kind)} - {*without}
    unknown = values.keys() - fields
    if unknown:
        raise workflow.JobError(
            f"config.{name}: unknown {', '.join(sorted(unknown))}; it may have {', '.join(sorted(fields))}"
        )
    return kind(**values)


def _plan(config: Mapping[str, Any], filters: Filters, parts: Sequence[Part]) -> dict[str, Any]:
    paths = [Path(path) for path in dict.fromkeys(part.path for part in parts)]
    plan = workflow.plan(config, paths) | {"prompts": PROMPTS}
    plan["blocked_words"] = hashlib.sha256("\n".join(sorted(filters.blocked)).encode()).hexdigest()
    plan["scoring_llm"] = workflow.plan({"llm": workflow.plain(config["scoring_llm"])})["llm"]
    return plan


@functools.cache
def _clip_scorer(name: str) -> Scorer:
    return ClipScorer(name)


@dataclasses.dataclass(frozen=True)
class FilterPairs:
    """Reads parts of the source and keeps the pairs that pass all rules.

    Attributes:
      out: folder of the job; pictures that lie in no file of their own are put there.
      scorer: makes what scores pictures and texts; None: the source's own similarity counts.
    """

    out: Path
    filters: Filters
    scorer: Callable[[], Scorer] | None = None

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        for row in rows:
            count = 0
            for some in _batches(image_text.read(Part(**row)), _SCORER_BATCH):
                count += len(some)
                with _quiet():
                    outcomes = list(self._outcomes(some))
                yield from outcomes
            yield Entered(count)

    def _outcomes(self, pairs: Sequence[Pair | Fault]) -> Iterator[Outcome]:
        looked = [self._look(pair) for pair in pairs]
        scores = self._scores(looked)
        for number, found in enumerate(looked):
            if isinstance(found, Dropped):
                yield found
                continue
            similarity = scores.get(number, found.pair.similarity)
            least = self.filters.min_similarity
            if least is not None and (similarity is None or not similarity > least):
                reason = "no CLIP score" if similarity is None else "CLIP score is too low"
                yield Dropped(found.pair.id, "CLIP score", reason)
                continue
            yield Passed(self._row(found, similarity))

    def _look(self, pair: Pair | Fault) -> "Dropped | _Looked":
        if isinstance(pair, Fault):
            return Dropped(pair.id, "read", pair.reason)
        reason = self.filters.reason(pair)
        if reason:
            return Dropped(pair.id, "filters", reason)
        code = language_code(pair.language or identify_language(pair.text) or "")
        if code is None or code not in (self.filters.languages or languages.LANGUAGES):
            return Dropped(pair.id, "language", NO_LANGUAGE)
        if pair.encoded is None:
            return _Looked(pair, None, code)
        try:
            picture, _ = image.preview(pair.encoded, name=pair.id)
        except image.ImageError as error:
            return Dropped(pair.id, "pictures", error.fault, error.reason)
        return _Looked(pair, picture, code)

    def _scores(self, looked: "Sequence[Dropped | _Looked]") -> dict[int, float]:
        """Place in the batch -> the scorer's similarity, where there is a scorer and a picture."""
        if self.scorer is None:
            return {}
        there = {
            number: found
            for number, found in enumerate(looked)
            if isinstance(found, _Looked) and found.picture is not None
        }
        if not there:
            return {}
        pictures = [found.picture for found in there.values()]
        scores = self.scorer()(pictures, [found.pair.text for found in there.values()])
        return dict(zip(there, np.asarray(scores, float).tolist(), strict=True))

    def _row(self, found: "_Looked", similarity: float | None) -> dict[str, Any]:
        pair = found.pair
        row = {"id": pair.id, "text": pair.text, "url": pair.url, "language": found.language}
        row |= {"nsfw": pair.nsfw, "similarity": similarity, "place": None, "hash": None}
        if found.picture is not None:
            place = pair.place or keep_picture(self.out, pair.encoded)
            row |= _picture_row(place, found.picture, pair.encoded)
        return row


class _Looked(NamedTuple):
    """A pair that passes all rules but the score, its picture if that is at hand, and its language."""

    pair: Pair
    picture: Image.Image | None
    language: str


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings: of a picture it is a reason that counts, or nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def keep_picture(out: Path, encoded: bytes) -> Place:
    """Puts a picture into the job's folder under its checksum, whole or not at all."""
    name = hashlib.sha256(encoded).hexdigest()
    path = Path("work", "pictures", name[:2], name)
    if not (out / path).is_file():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out / path, encoded)
    return Place(path.as_posix(), 0, len(encoded))


def _picture_row(place: Place, picture: Image.Image, encoded: bytes) -> dict[str, Any]:
    """What a row holds of its picture."""
    size = image.header_size(encoded)
    return {"place": place, "size": size, "hash": near_duplicates.perceptual_hash(picture)}


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    some: list[Any] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def unique(job: Job, source: str, stage: str, alike: NearDuplicates) -> Iterator[Outcome]:
    """The rows of a part without those that are like an earlier one.

    Hashes alone are held, in this process: about 1 GB a million rows.
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
    """Gets the pictures that are not at hand and looks at them as `Filter` does."""

    out: Path
    filters: Filters
    fetch: Fetch
    concurrency: int = 32

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        with _quiet(), futures.ThreadPoolExecutor(self.concurrency) as pool:
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


def _sections(out: Path, shards: int) -> dict[str, dict[str, Any]]:
    """What the records are of, counted from their provenance."""
    counts = {
        name: Counter() for name in ("Languages", "Subjects", "Countries", "Task types", "Pairs")
    }
    for shard in range(shards):
        path = out / "provenance" / f"{shard:05d}.jsonl"
        with path.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                counts["Languages"][row["language"]] += 1
                counts["Subjects"][row["subject"]] += 1
                counts["Countries"][row["country"]] += 1
                counts["Task types"].update(row["task_types"])
                if "dropped_pairs" in row:
                    counts["Pairs"][f"records of {len(row['task_types'])}"] += 1
                    counts["Pairs"].update(f"dropped: {why}" for why in row["dropped_pairs"])
    counts["Countries"] = Counter(dict(counts["Countries"].most_common(40)))
    return {name: dict(found.most_common()) for name, found in counts.items()}
