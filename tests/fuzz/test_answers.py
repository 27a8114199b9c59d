"""Any text as a model's answer, a judge's reply or a file of responses: a reading or the module's own error, at once.

Short here. For a long run, see docs/security.md: HYPOTHESIS_EXAMPLES=1000000 pytest tests/fuzz/test_answers.py
"""

import json
import os
import re
import string
import time
from fractions import Fraction

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is in requirements-dev.txt")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval.bench import documents
from eval.bench.metrics import captions, continuations, mmmu
from eval.bench.models import ResponseFile
from eval.bench.reading.letter import letter
from eval.bench.reading.number import number
from eval.bench.reading.short import same_value, short
from eval.bench.reading.truth import truth
from eval.bench.task import Document, Failed, Scored
from eval.bench.tasks import DATASETS, m_llavabench, xchat
from tests.fuzz.rows import ROWS

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "40"))
SHORT = settings(
    max_examples=EXAMPLES,
    deadline=None,  # `within_limits` counts the time of this process alone
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SECONDS = 1.0  # of the processor, for at most 10 kB; about a hundred times what they take

# What answers are made of, so that a text is often close to one that means something.
_PIECES = (
    "answer is |The answer is |答案是|答えは|정답은|الجواب هو |उत्तर |A|B.|(C)|D)|a |not |neither |or |and |1 000 |"
    "1,000.5|3/4|½|-5|١٢|十八|####|=|\\boxed{|}|\\frac{1}{2}|<answer>|</answer>|</think>|true|false|yes|no|不|**|_|\n|"
    "\t|. |, |: |[RESULT] 4|score of 5|8 9|\u202e|\u200d|\u0301|\x00|\x1b[31m|'s|n't|http://|@|&amp;|<b>|...|'|\"|Σ|İ|𝟙|🄰|①"
)
PIECES = _PIECES.split("|")
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.text(max_size=200),
    # Repeated to 10 kB: what takes quadratic time shows here.
    st.tuples(
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join), st.text(max_size=5)
    ).map(
        lambda parts: (parts[0] * (10_000 // len(parts[0]) if parts[0] else 0))[:10_000] + parts[1]
    ),
)
LANGUAGES = st.sampled_from(["en", "zh", "ja", "th", "hi", "ar", "te", "tr", "fr", None])


def within_limits(call):
    """What a call returns, which takes less than `SECONDS` once its patterns are compiled."""
    for _ in range(2):
        began = time.process_time()
        found = call()
        if time.process_time() - began < SECONDS:
            return found
    raise AssertionError(f"more than {SECONDS:g} s")


@SHORT
@given(TEXTS, LANGUAGES)
def test_readers(text, language):
    options = ["a dog", "cat", "1 000"]
    assert within_limits(lambda: letter(text, options, language)) in (None, "A", "B", "C")
    assert within_limits(lambda: truth(text, language)) in (None, "true", "false")
    assert isinstance(within_limits(lambda: number(text, language)), Fraction | None)
    assert isinstance(within_limits(lambda: same_value(short(text, language), language)), str)
    candidates = within_limits(lambda: mmmu.parse_open(text))
    assert all(isinstance(value, str | float) for value in candidates)


@SHORT
@given(st.sampled_from(sorted(ROWS)), st.sampled_from(["paper", "fixed"]), TEXTS, st.integers(0, 9))
def test_scores_of_every_task(name, profile, text, which):
    dataset = DATASETS[name.partition(" ")[0]]
    subset = dataset.subsets[which % len(dataset.subsets)]
    document = Document("d", ROWS[name])
    found = within_limits(lambda: dataset.score(document, text, subset, profile, "7 8\nfine"))
    assert isinstance(found, Scored | Failed)
    if isinstance(found, Scored):
        assert all(value == value for value in found.statistics), "a score is NaN"
        json.dumps([found.filtered, dict(found.metrics)])


@SHORT
@given(TEXTS)
def test_judges_replies(reply):
    assert within_limits(lambda: xchat.read_grade(reply)) in (None, 1, 2, 3, 4, 5)
    assert within_limits(lambda: xchat.paper_grade(reply)) in (None, 1, 2, 3, 4, 5)
    scores = within_limits(lambda: m_llavabench.read_scores(reply))
    assert scores is None or all(1 <= score <= 10 for score in scores)
    assert all(abs(score) < float("inf") for score in m_llavabench.paper_scores(reply))


WORDS = st.lists(st.sampled_from("abcd"), max_size=30)


def _slow_common_subsequence(first, second):
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for j, other in enumerate(second, 1):
            above = row[j]
            row[j] = diagonal + 1 if token == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


@SHORT
@given(WORDS, WORDS)
def test_the_longest_common_subsequence(first, second):
    assert captions._common_subsequence(first, second) == _slow_common_subsequence(first, second)


@SHORT
@given(st.text("0123,.-eE+ x", max_size=40))
def test_numbers_of_mmmu_are_those_of_its_own_patterns(text):
    """Ours look behind, which takes quadratic time away; MMMU's do not."""
    scientific = re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", text)
    plain = re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", text)
    assert mmmu.extract_numbers(text)[-len(scientific + plain) or len(text) :] == scientific + plain


_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.just(10**400)
)
_LISTS = st.lists(_LEAVES, max_size=3)
VALUES = _LEAVES | _LISTS | st.dictionaries(st.text(max_size=5), _LEAVES | _LISTS, max_size=3)
LINES = st.one_of(
    st.fixed_dictionaries({"task": VALUES, "doc_id": VALUES, "response": VALUES}).map(json.dumps),
    st.builds(
        lambda i, r: json.dumps({"task": "t", "doc_id": i, "response": r}),
        st.integers(0, 2),
        VALUES,
    ),
    st.text(string.printable, max_size=30),
    st.integers(990, 2_000).map(lambda depth: "[" * depth),
    st.just('{"task": "t", "doc_id": ' + "7" * 5_000 + "}"),
    st.just('{"task": "t", "doc_id": "\\ud800", "response": ""}'),
)


@SHORT
@given(st.lists(LINES, max_size=5), st.binary(max_size=5))
def test_files_of_responses(tmp_path_factory, lines, rest):
    path = tmp_path_factory.mktemp("responses") / "r.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n" * bool(rest) + rest)
    names, said = [], str(path)
    try:
        file = within_limits(lambda: ResponseFile(path))
        names = [name for pair in file.unused for name in pair]
    except documents.DataError as error:
        said = str(error)
    assert str(path) in said and len(said) < 1_000 + len(str(path))
    assert all(isinstance(name, str) for name in names)


@SHORT
@given(VALUES | st.lists(VALUES, min_size=2, max_size=2))
def test_log_likelihoods(response):
    found = continuations.score(DATASETS["xstorycloze"], response, (" a", " bc"), 1)
    assert isinstance(found, Scored | Failed)
