"""Instructions about pictures of many cultures, from image/alt-text pairs of the web (paper, section 2.2).

    filter      read; size, aspect, length, NSFW tag, offensive words, language, CLIP score
    unique      repeated ids, alike alt texts, alike pictures
    score       a model reads the alt text: quality, subject, country; poor and countryless ones go
    balance     frequent subjects and languages are thinned out
    fetch       pictures of which only the address is known
    fetched     alike pictures among those fetched
    records     recaptioned in the language of the alt text, two instructions made of it, checked

The first and the third prompt and its variants are those of Appendix B; of the last one the paper prints
the task types and rules. Alt texts and the model's answers are data: they are checked, put into prompts
and records, and never followed or run. Lists of offensive words, near-duplicate thresholds, the CLIP model
and the numbers of the balance are not published; ours are in configs/curation/cultural.py.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pangea_jax import languages
from pangea_jax.curation import image_text, language_check, llm, markup, pipeline
from pangea_jax.curation.image_text import Fault, Fetch, Filters, Pair, Part, Place, Scorer
from pangea_jax.curation.pipeline import Dropped, Entered, Job, Kept, Outcome, Passed
from pangea_jax.data import image, runners
from pangea_jax.data.atomic import write_bytes
from pangea_jax.data.record import IMAGE_MARKER, Conversation, Turn, identify_language

PROMPTS = "pangea-appendix-b/1"
"""Version of the prompts, part of every record's provenance."""

SUBJECTS = (
    "Vehicles and Transportation",
    "Cooking and Food",
    "People and Everyday Life",
    "Sports and Recreation",
    "Plants and Animals",
    "Objects, Materials, and Clothing",
    "Brands and Products",
    "Geography, Buildings, and Landmarks",
    "Tradition, Art, and History",
    "Public Figure and Pop-Culture",
    "Others",
)
TASK_TYPES = (
    "Coding & Debugging",
    "Information Seeking",
    "Creative Writing",
    "Critical Reasoning",
    "Planning & Strategy",
    "Mathematical Thinking",
    "Text Revision & Editing",
    "Data Analysis",
    "Role Playing & Scenarios",
    "Brainstorming & Ideation",
    "Advice Seeking & Problem-Solving",
    "Learning & Understanding",
    "Cultural Interpretation",
)
SCORING = """You are given an [Alt Text] associated with an image from the web. [Alt Text]: {text} Your goal is to:
1. Evaluate Text Quality: Rate the following alt text on a scale from 1 to 5 based on its quality in describing \
the image, assuming the model does not have access to the image: 1 (Very Low Quality): Alt text is vague, \
irrelevant, misleading, or uses placeholders (e.g., file names). 2 (Low Quality): Alt text is overly simplistic, \
generic, or provides minimal useful information. 3 (Moderate Quality): Alt text is somewhat descriptive but lacks \
detail or relevance, with possible redundancy or ambiguity. 4 (High Quality): Alt text is descriptive, clear, \
concise, and provides sufficient information to understand the image's content. 5 (Very High Quality): Alt text \
is highly specific, detailed, and relevant, with a clear description that conveys all key aspects of the image.
2. Subject Classification: Assign a subject/category to the alt text based on its content. Choose from the \
following categories: {subjects}
3. Country/Region Classification: Decide if the alt text is closely related to a specific country's culture. For \
example, if the alt text says, "Tokyo Skytree Photo in March with beautiful cherry blossoms", it's strongly \
related to Japan. If the alt text is not specifically about a certain culture or country, you can say "No \
specific country". Even if the alt text is written in their official language, it doesn't mean the caption is \
specifically about the country (e.g., a product page caption is often unlikely to be country-specific).
Output: Provide the final result in the following structured format: 1. Text Quality Score (1-5): 2. Subject \
Category: 3. Country/Region: Only generate the final result without any additional descriptions or explanations."""
RECAPTION = (
    "Please describe the image in detail in {language}. The image might be related to the country: "
    '"{country}". The topic might be related to: "{subject}". The previous short caption of the image is '
    "{text}.",
    'Analyze this image and provide a comprehensive description in "{language}". Consider that it may be '
    'associated with "{country}" and the theme could be related to "{subject}". If there is cultural '
    "significance, please include it. A brief previous description was: {text}.",
    'In "{language}", give a detailed description of what you see in this image. Keep in mind it might be '
    'connected to "{country}" and the subject could be about "{subject}". If there are culturally relevant '
    "details, please include them. An earlier short description stated: {text}.",
    'Examine this image closely and describe its contents in "{language}" in a more structured way. The image '
    'might have a connection to "{country}" and could be about "{subject}". A previous concise caption '
    "mentioned: {text}.",
    'Using "{language}", provide an in-depth and structured description of this image. It may be related to '
    '"{country}" and the topic could be associated with "{subject}". A prior brief description was given as: '
    "{text}.",
)
INSTRUCTIONS = """Task: Generate two instruction-response pairs based on the visual content of an image. Choose two \
task types from the list below: {task_types}.
Guidelines:
1. The two pairs are of two different task types.
2. An instruction needs details of the image and cannot be answered without seeing it.
3. A response is detailed and well structured, takes several perspectives or goes step by step where that helps.
4. The instructions are varied and challenging.
5. Write as if looking at the image: never mention a caption or a description.
6. Write instruction and response in {language}, and the task type in English.
Output: a JSON list of two objects with the keys "task type", "instruction" and "response", and nothing else.
Caption: {caption}"""

STAGES = (
    *("read", "filters", "language", "pictures", "CLIP score", "near-duplicates"),
    *("scoring", "quality", "country", "balance", "accessible", "alike when fetched"),
    *("recaption", "captions kept", "instructions", "checks"),
)
PARTS = ("filter", "unique", "score", "balance", "fetch", "fetched", pipeline.RECORDS)
PUBLISHED = {
    "read": "10M pairs sampled from LAION-Multi",
    "quality": "below 4 of 5 dropped",
    "country": "about 60 % have no specific country",
    "accessible": "30 % lost; 1M pictures remain",
    "captions kept": "300K captions are in the release",
    "instructions": "up to two pairs a picture; 1.5M samples in all",
}
MIN_QUALITY = 4
NO_LANGUAGE = "language is not identified or not wanted"
CATEGORY = "cultural"

_MAX_SCORE_CHARS = 2_000
_CAPTION_CHARS, _INSTRUCTION_CHARS, _RESPONSE_CHARS = (20, 10_000), (5, 2_000), (20, 12_000)
_SCORER_BATCH = 64
_MAX_REPETITION = 0.5
_OF_CAPTION = re.compile(r"\b(?:caption|alt[- ]text)s?\b", re.IGNORECASE)


class Unusable(ValueError):
    """An answer that cannot be used, for a reason that can be counted.

    Attributes:
      rest: what is usable of it all the same, if no better answer comes.
    """

    def __init__(self, reason: str, detail: str = "", rest: Any = None):
        self.reason, self.detail, self.rest = reason, detail, rest
        super().__init__(f"{reason} ({detail})" if detail else reason)


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


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """When rows are alike.

    Attributes:
      min_text_similarity: of alt texts, estimated Jaccard of their shingles; None: they are not compared.
      max_hash_distance: of pictures, in bits of 64.
    """

    min_text_similarity: float | None = image_text.MIN_TEXT_SIMILARITY
    max_hash_distance: int = image_text.MAX_HASH_DISTANCE


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
      llm.Stop: the budget is spent or the endpoint gone; the same call goes on.
      pipeline.JobError, ValueError: settings that cannot be carried out.
    """
    job, settings = Job(out, STAGES, config["shard_size"]), _Settings.of(config)
    source = Path(config["source"])
    if not source.exists():
        raise pipeline.JobError(f"config.source={source}: no such file or folder")
    if scorer is None and config["clip_model"]:
        scorer = functools.partial(_clip_scorer, config["clip_model"])
    parts = image_text.find_parts(source)
    go = runners.Beam(runner_options)
    with job.started(_plan(config, settings.filters, parts)):
        sources = dataclasses.replace(job, shard_size=1)
        sources.split("sources", (Passed(part._asdict()) for part in parts))
        job.map(go, "filter", "sources", Filter(out, settings.filters, scorer))
        _choose(job, go, settings)
        make = Make(
            llm=settings.llm,
            replies=job.replies,
            out=out,
            source=f"{CATEGORY}/{config['name']}",
            scoring_model=settings.scoring_llm.model,
            caption_share=config["caption_share"],
            side=config["picture_side"],
            seed=config["seed"],
        )
        job.map(go, pipeline.RECORDS, "fetched", make)
        return job.report(
            PARTS,
            title="Cultural instructions from image/alt-text pairs",
            published=PUBLISHED,
            sections=_sections(out, job.shards(pipeline.RECORDS)),
            usage=llm.client(settings.llm, job.replies).usage(),
        )


def _choose(job: Job, go: runners.Run, settings: "_Settings") -> None:
    """The parts between reading the pairs and making the records: which pictures are worth it."""
    alike = settings.near_duplicates
    job.split("unique", unique(job, "filter", "near-duplicates", alike), source="filter")
    job.map(go, "score", "unique", Score(settings.scoring_llm, job.replies))
    job.split("balance", balanced(job, "score", settings.balance), source="score")
    job.map(go, "fetch", "balance", FetchPictures(job.out, settings.filters, settings.fetch))
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
    try:
        codes = tuple(languages.get(tag).code for tag in config["languages"])
    except KeyError as error:
        raise pipeline.JobError(f"config.languages: {error.args[0]}") from None
    blocked: frozenset[str] = frozenset()
    if config["blocked_words"]:
        lines = Path(config["blocked_words"]).read_text(encoding="utf-8").splitlines()
        entries = (line.strip() for line in lines)
        blocked = frozenset(entry for entry in entries if entry and not entry.startswith("#"))
    filters = _section(config, "filters", Filters, without=("languages", "blocked"))
    return dataclasses.replace(filters, languages=codes or languages.PANGEAINS, blocked=blocked)


def _section(config: Mapping[str, Any], name: str, kind: type, without: Sequence[str] = ()) -> Any:
    """A part of the config as the class that it describes.

    Raises:
      JobError: it has a key that the class has not.
    """
    values = pipeline.plain(config[name])
    fields = {field.name for field in dataclasses.fields(kind)} - {*without}
    unknown = values.keys() - fields
    if unknown:
        raise pipeline.JobError(
            f"config.{name}: unknown {', '.join(sorted(unknown))}; it may have {', '.join(sorted(fields))}"
        )
    return kind(**values)


def _plan(config: Mapping[str, Any], filters: Filters, parts: Sequence[Part]) -> dict[str, Any]:
    paths = [Path(path) for path in dict.fromkeys(part.path for part in parts)]
    plan = pipeline.plan(config, paths) | {"prompts": PROMPTS}
    plan["blocked_words"] = hashlib.sha256("\n".join(sorted(filters.blocked)).encode()).hexdigest()
    plan["scoring_llm"] = pipeline.plan({"llm": pipeline.plain(config["scoring_llm"])})["llm"]
    return plan


@functools.cache
def _clip_scorer(name: str) -> Scorer:
    return image_text.ClipScorer(name)


# filter


@dataclasses.dataclass(frozen=True)
class Filter:
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
            pair, picture, code = found
            similarity = scores.get(number, pair.similarity)
            least = self.filters.min_similarity
            if least is not None and (similarity is None or not similarity > least):
                reason = "no CLIP score" if similarity is None else "CLIP score is too low"
                yield Dropped(pair.id, "CLIP score", reason)
                continue
            yield Passed(self._row(pair, picture, code, similarity))

    def _look(self, pair: Pair | Fault) -> Dropped | tuple[Pair, Image.Image | None, str]:
        if isinstance(pair, Fault):
            return Dropped(pair.id, "read", pair.reason)
        reason = self.filters.reason(pair)
        if reason:
            return Dropped(pair.id, "filters", reason)
        code = image_text.language_code(pair.language or identify_language(pair.text) or "")
        if code is None or code not in (self.filters.languages or languages.LANGUAGES):
            return Dropped(pair.id, "language", NO_LANGUAGE)
        if pair.encoded is None:
            return pair, None, code
        try:
            picture, _ = image.preview(pair.encoded, name=pair.id)
        except image.ImageError as error:
            return Dropped(pair.id, "pictures", error.fault, error.reason)
        return pair, picture, code

    def _scores(self, looked) -> dict[int, float]:
        """Place in the batch -> the scorer's similarity, where there is a scorer and a picture."""
        if self.scorer is None:
            return {}
        there = [n for n, x in enumerate(looked) if not isinstance(x, Dropped) and x[1] is not None]
        if not there:
            return {}
        pictures, texts = [looked[n][1] for n in there], [looked[n][0].text for n in there]
        found = self.scorer()(pictures, texts)
        return dict(zip(there, np.asarray(found, float).tolist(), strict=True))

    def _row(self, pair, picture, code, similarity) -> dict[str, Any]:
        row = {"id": pair.id, "text": pair.text, "url": pair.url, "language": code}
        row |= {"nsfw": pair.nsfw, "similarity": similarity, "place": None, "hash": None}
        if picture is not None:
            place = pair.place or keep_picture(self.out, pair.encoded)
            row |= _picture_row(place, picture, pair.encoded)
        return row


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
    return {"place": place, "size": size, "hash": image_text.perceptual_hash(picture)}


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    some: list[Any] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


# unique


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
        new = image_text.unlike_earlier_texts(texts, least)
    for row, is_new in zip(job.read_all(source), new, strict=False):
        key = hashlib.blake2b(row["id"].encode(), digest_size=12).digest()
        reason = None if is_new else "alt text is like another"
        reasons.append("id is taken" if key in seen else reason)
        seen.add(key)
        if reasons[-1] is None and row["hash"] is not None:
            numbers.append(len(reasons) - 1)
            hashes.append(row["hash"])
    stays = image_text.unlike_earlier_pictures(np.array(hashes, np.uint64), alike.max_hash_distance)
    for number in np.array(numbers, int)[~stays].tolist():
        reasons[number] = "picture is like another"
    for reason, row in zip(reasons, job.read_all(source), strict=True):
        yield Passed(row) if reason is None else Dropped(row["id"], stage, reason)


# score


@dataclasses.dataclass(frozen=True)
class Score:
    """A model reads alt texts: their quality, subject and country."""

    llm: llm.ClientConfig
    replies: Path

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        client = llm.client(self.llm, self.replies)
        for _, outcome in client.map(functools.partial(self._score, client), rows):
            yield outcome

    def _score(self, client: llm.Client, row: Mapping[str, Any]) -> Outcome:
        prompt = SCORING.format(text=row["text"], subjects="; ".join(SUBJECTS))
        messages = [{"role": "user", "content": prompt}]
        try:
            score = ask(client, messages, "score", read_score)
        except (llm.Refused, Unusable) as error:
            return Dropped(row["id"], "scoring", error.reason, error.detail)
        if score["quality"] < MIN_QUALITY:
            return Dropped(row["id"], "quality", f"quality {score['quality']}")
        if score["country"] is None:
            return Dropped(row["id"], "country", "no specific country")
        return Passed({**row, **score})


def ask(
    client: llm.Client,
    messages: Sequence[Mapping[str, Any]],
    purpose: str,
    read: Callable[[str], Any],
) -> Any:
    """What `read` makes of the model's answer; an unusable one is asked for once more, warmer.

    Raises:
      Unusable: neither answer can be used.
      llm.Refused, llm.Stop: see `llm.Client.complete`.
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


# Possessive: a line of a thousand asterisks must not be tried in a million ways.
_SCORE_LINE = re.compile(
    r"[^\w:]*+([123])?[.)]?[^\w:]*+(text quality|subject|country)?[^:\n]*+:\s*+(.*)", re.I
)
_PLAIN_LINE = re.compile(r"\W*+([123])[.)]\s++()(.*)")
_KEYS = {"1": "quality", "2": "subject", "3": "country"}


def read_score(answer: str) -> dict[str, Any]:
    """Quality 1 to 5, subject of `SUBJECTS` and country (None for none) of the model's three lines.

    >>> read_score("1. Text Quality Score (1-5): 4\\n2. Subject Category: Cooking and Food\\n3. Country/Region: Japan")
    {'quality': 4, 'subject': 'Cooking and Food', 'country': 'Japan'}

    Raises:
      Unusable: what is missing or not of the given choices.
    """
    if len(answer) > _MAX_SCORE_CHARS:
        raise Unusable("score is no score", f"{len(answer):,} characters")
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
        raise Unusable("score is no score", f"no {', '.join(sorted(missing))}")
    quality = re.fullmatch(r"([1-5])(?:\.0)?(?:\s*(?:/\s*5|\(.*\)))?", found["quality"])
    if quality is None:
        raise Unusable("quality is not 1 to 5", found["quality"][:60])
    return {
        "quality": int(quality[1]),
        "subject": _choice(found["subject"], SUBJECTS, "subject is not among the eleven"),
        "country": _country(found["country"]),
    }


def _choice(value: str, choices: Sequence[str], reason: str) -> str:
    def bare(text: str) -> str:
        return " ".join(image_text.words(text.replace("&", " and ")))

    named = {bare(choice): choice for choice in choices}
    if bare(value) not in named:
        raise Unusable(reason, value[:60])
    return named[bare(value)]


def _country(value: str) -> str | None:
    if re.match(r"(?:no |not |none\b|n/a\b|unspecified|global\b|worldwide)", value, re.I):
        return None
    # It goes into a prompt: a name is a few words, nothing that could be an instruction.
    if not 2 <= len(value) <= 60 or not re.fullmatch(r"[^\W\d_][^\d_\n:;<>{}|]*", value):
        raise Unusable("country is no name", value[:60])
    return value


# balance


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


def _share(id: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that the id decides."""
    return int.from_bytes(_draw(f"{purpose}/{id}", seed)[:7], "big") / 2**56


# fetch


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
        except image_text.FetchError as error:
            return Dropped(row["id"], "accessible", str(error), row["url"][:200])
        except image.ImageError as error:
            return Dropped(row["id"], "accessible", error.fault, error.reason)
        return Passed({**row, **_picture_row(keep_picture(self.out, encoded), picture, encoded)})


# records


@dataclasses.dataclass(frozen=True)
class Make:
    """Recaptions pictures and makes instructions of the captions.

    Attributes:
      source: of the records.
      scoring_model: for the provenance.
      caption_share: of the pictures whose caption becomes a record of its own, too.
      side: pictures are shown to the model with at most so many pixels a side.
      seed: decides prompts' variants and where markers stand.
    """

    llm: llm.ClientConfig
    replies: Path
    out: Path
    source: str
    scoring_model: str
    caption_share: float
    side: int
    seed: int

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        client = llm.client(self.llm, self.replies)
        for _, outcomes in client.map(functools.partial(self._make, client), rows):
            yield from outcomes

    def _make(self, client: llm.Client, row: Mapping[str, Any]) -> list[Outcome]:
        id, code = row["id"], row["language"]
        encoded = Place(*row["place"]).read(self.out)
        language = languages.get(code).english_name
        variant = int(_share(id, self.seed, "recaption") * len(RECAPTION))
        values = {"language": language, "country": row["country"], "subject": row["subject"]}
        prompt = RECAPTION[variant].format(text=row["text"], **values)
        shown = {"type": "image_url", "image_url": {"url": data_url(encoded, self.side)}}
        messages = [{"role": "user", "content": [shown, {"type": "text", "text": prompt}]}]
        try:
            caption = ask(client, messages, "recaption", functools.partial(read_caption, code=code))
        except (llm.Refused, Unusable) as error:
            return [Dropped(id, "recaption", error.reason, error.detail)]
        found = _Found(row, encoded, caption, variant)
        outcomes: list[Outcome] = []
        if _share(id, self.seed, "caption") < self.caption_share:
            outcomes += [pipeline.Added("captions kept", 1), self._captioned(found, language)]
        prompt = INSTRUCTIONS.format(
            task_types="; ".join(TASK_TYPES), language=language, caption=caption
        )
        messages = [{"role": "user", "content": prompt}]
        try:
            pairs, faults = ask(
                client, messages, "instructions", functools.partial(read_pairs, code=code)
            )
        except (llm.Refused, Unusable) as error:
            return [*outcomes, Dropped(id, "instructions", error.reason, error.detail)]
        return [*outcomes, self._instructed(found, pairs, faults)]

    def _captioned(self, found: "_Found", language: str) -> Kept:
        question = f"What are the main elements of the image? Describe them in {language}."
        turns = self._turns(found, [(question, found.caption)])
        return self._kept(found, f"{found.id}-caption", turns, {"task_types": ["Captioning"]})

    def _instructed(self, found: "_Found", pairs, faults) -> Kept:
        turns = self._turns(found, [(pair["instruction"], pair["response"]) for pair in pairs])
        more = {"task_types": [pair["task type"] for pair in pairs], "dropped_pairs": faults}
        return self._kept(found, found.id, turns, more)

    def _turns(self, found: "_Found", pairs: Sequence[tuple[str, str]]) -> tuple[Turn, ...]:
        """In the release the marker stands before or after the first question."""
        (question, answer), *rest = pairs
        first = _share(found.id, self.seed, "marker") < 0.5
        marked = f"{IMAGE_MARKER}\n{question}" if first else f"{question}\n{IMAGE_MARKER}"
        return tuple(
            Turn(role, text)
            for pair in [(marked, answer), *rest]
            for role, text in zip(("user", "assistant"), pair, strict=True)
        )

    def _kept(self, found: "_Found", id: str, turns, more: Mapping[str, Any]) -> Kept:
        row = found.row
        folder = hashlib.blake2b(found.id.encode(), digest_size=1).hexdigest()
        name = f"images/{folder}/{image_text.file_name(found.id, found.encoded)}"
        record = Conversation(id, self.source, row["language"], CATEGORY, (name,), turns)
        provenance = {
            "id": id,
            "source_id": found.id,
            "url": row["url"],
            "alt_text": row["text"],
            "language": row["language"],
            "filters": {key: row[key] for key in ("size", "nsfw", "similarity", "hash")},
            **{key: row[key] for key in ("quality", "subject", "country")},
            "models": {"scoring": self.scoring_model, "captions": self.llm.model},
            "prompts": {"version": PROMPTS, "recaption": f"P{found.variant + 1}"},
            "caption": found.caption,
        }
        return Kept(record, provenance | more, {name: found.encoded})


@dataclasses.dataclass(frozen=True)
class _Found:
    """What is known of a picture when its records are made."""

    row: Mapping[str, Any]
    encoded: bytes
    caption: str
    variant: int

    @property
    def id(self) -> str:
        return self.row["id"]


def data_url(encoded: bytes, side: int) -> str:
    """A picture as models take it: JPEG, PNG or WebP as it is, else and if larger re-coded as JPEG."""
    with Image.open(io.BytesIO(encoded), formats=image.FORMATS) as opened:
        kind, size = opened.format.lower(), opened.size
    if kind not in ("jpeg", "png", "webp") or max(size) > side:
        picture = image.decode(encoded)
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        encoded, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def read_caption(answer: str, code: str) -> str:
    """The caption.

    Raises:
      Unusable: too short or long, in another language, repeating itself, or with a marker.
    """
    text = answer.strip()
    fault = text_fault(text, code, *_CAPTION_CHARS)
    if fault:
        raise Unusable(f"caption {fault}", text[:80])
    return text


def read_pairs(answer: str, code: str) -> tuple[list[dict[str, str]], list[str]]:
    """Two usable pairs of instruction and response, and why others were not.

    Raises:
      Unusable: there are fewer; the rest has what there is.
    """
    faults, pairs = [], []
    for found in _objects(answer):
        try:
            pair = _pair(found, code)
        except Unusable as error:
            faults.append(error.reason)
            continue
        if pair["task type"] in (other["task type"] for other in pairs):
            faults.append("both pairs are of one task type")
        elif len(pairs) < 2:
            pairs.append(pair)
    if not pairs:
        raise Unusable(faults[0] if faults else "no JSON of pairs", answer[:80])
    if len(pairs) == 1:
        rest = pairs, faults or ["there was only one pair"]
        raise Unusable("only one pair can be used", "; ".join(rest[1]), rest)
    return pairs, faults


def _objects(answer: str) -> list[dict[str, Any]]:
    """The JSON objects with an instruction in an answer, whatever is around them."""
    decoder, found, place = json.JSONDecoder(), [], 0
    if len(answer) > 2 * sum((_INSTRUCTION_CHARS[1], _RESPONSE_CHARS[1])):
        raise Unusable("answer is too long", f"{len(answer):,} characters")
    while (start := re.compile(r"[\[{]").search(answer, place)) is not None:
        try:
            value, place = decoder.raw_decode(answer, start.start())
        except ValueError:
            place = start.end()
            continue
        except RecursionError:
            raise Unusable("no JSON of pairs", "nested too deeply") from None
        stack = [value]
        while stack:
            value = stack.pop(0)
            if isinstance(value, dict) and "instruction" in map(str.lower, value):
                found.append({key.lower().replace("_", " "): v for key, v in value.items()})
            elif isinstance(value, dict | list):
                stack += value.values() if isinstance(value, dict) else value
    return found


def _pair(found: Mapping[str, Any], code: str) -> dict[str, str]:
    pair = {key: found.get(key) for key in ("task type", "instruction", "response")}
    if not all(isinstance(value, str) for value in pair.values()):
        raise Unusable("a key is missing or no text")
    pair = {key: value.strip() for key, value in pair.items()}
    pair["task type"] = _choice(pair["task type"], TASK_TYPES, "task type is not among the 13")
    limits = {"instruction": _INSTRUCTION_CHARS, "response": _RESPONSE_CHARS}
    for key, (least, most) in limits.items():
        fault = text_fault(pair[key], code, least, most)
        if fault:
            raise Unusable(f"{key} {fault}")
        if _OF_CAPTION.search(pair[key]):
            raise Unusable(f"{key} speaks of a caption")
    if image_text.words(pair["instruction"]) == image_text.words(pair["response"]):
        raise Unusable("response is the instruction")
    return pair


def text_fault(text: str, code: str, least: int, most: int) -> str | None:
    """What is wrong with a text that was written for a record, None if nothing is."""
    if not least <= len(text) <= most:
        return f"is too {'short' if len(text) < least else 'long'}"
    if not image_text.is_unicode(text):
        return "holds half a character"
    if IMAGE_MARKER in text:
        return "holds a marker"
    if markup.repetition(text) > _MAX_REPETITION:
        return "repeats itself"
    try:
        prose = markup.prose(text)
    except ValueError:
        return "holds every kind of bracket"
    faults = language_check.language_faults(prose, code)
    return f"is in {faults[0].reason}" if faults else None


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
