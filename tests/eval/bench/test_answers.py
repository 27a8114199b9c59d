"""Answers are read right in every language.

`answers/<language>.jsonl` has one answer a line: the reader, the answer, the options if any, and the reading (null: not
answered). The lines are written as models answer. `pytest -s -k shares` prints the share read right per language.
"""

import functools
import json
import random
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from eval.bench.metrics import mmmu, numbers
from eval.bench.reading.letter import letter
from eval.bench.reading.number import number
from eval.bench.reading.short import plain, same_value, short
from eval.bench.reading.truth import truth
from eval.bench.task import Document
from eval.bench.tasks import ALL_TASKS, xmmmu
from pangea_jax.languages import LANGUAGES, PANGEABENCH

FOLDER = Path(__file__).parent / "answers"
READERS = ("letter", "truth", "number", "short")
FOUR = ["cat", "grass", "dog", "sheep"]


@functools.cache
def _corpus() -> dict[str, list[dict]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in sorted(FOLDER.glob("*.jsonl"))
    }


def _read(row: dict, language: str):
    text = row["answer"]
    if row["reader"] == "letter":
        return letter(text, row["options"], language)
    if row["reader"] == "truth":
        return truth(text, language)
    if row["reader"] == "number":
        return number(text, language)
    return same_value(short(text, language), language)


def _expected(row: dict, language: str):
    if row["reader"] == "short":
        return same_value(row["reading"], language)
    is_number = row["reader"] == "number" and row["reading"] is not None
    return Fraction(row["reading"]) if is_number else row["reading"]


def _wrong() -> list[tuple[str, dict, object]]:
    return [
        (language, row, read)
        for language, rows in _corpus().items()
        for row in rows
        if (read := _read(row, language)) != _expected(row, language)
    ]


def test_the_corpus_has_every_language():
    assert set(_corpus()) == set(LANGUAGES) > set(PANGEABENCH)
    for language, rows in _corpus().items():
        assert len(rows) >= 40, language
        assert {row["reader"] for row in rows} == set(READERS), language
        assert any(row["reading"] is None for row in rows), language
        assert len({(row["reader"], row["answer"]) for row in rows}) == len(rows), language


def test_shares_read_right():
    wrong = _wrong()
    sizes = Counter(
        (language, row["reader"]) for language, rows in _corpus().items() for row in rows
    )
    missed = Counter((language, row["reader"]) for language, row, _ in wrong)
    shares = {}
    print(f"\n{'language':10}" + "".join(f"{reader:>10}" for reader in READERS) + f"{'all':>10}")
    for language, rows in _corpus().items():
        own = [1 - missed[language, r] / sizes[language, r] for r in READERS]
        shares[language] = 1 - sum(missed[language, r] for r in READERS) / len(rows)
        print(f"{language:10}" + "".join(f"{share:10.1%}" for share in (*own, shares[language])))
    best, worst = max(shares, key=shares.get), min(shares, key=shares.get)
    gap, overall = shares[best] - shares[worst], 1 - len(wrong) / sizes.total()
    print(f"{sizes.total()} answers, {overall:.2%} read right; gap {gap:.1%} ({best} and {worst})")
    for language, row, read in wrong:
        print(f"{language} {row['reader']} {row['answer']!r}: {read!r}, not {row['reading']!r}")
    assert overall >= 0.995
    assert min(shares.values()) >= 0.98
    assert gap <= 0.015


def test_no_reading_is_the_opposite():
    """A letter or truth value that is missed is missed as "not answered", never as another one."""
    for language, row, read in _wrong():
        if row["reader"] in ("letter", "truth"):
            assert None in (read, row["reading"]), (language, row, read)


OPTIONS = {"question": "?", "options": FOUR, "answer": "B", "images": []}
STATEMENT = {"hypothesis": "?", "answer": False, "images": []}


@pytest.mark.parametrize(
    ("name", "row", "response", "read"),
    [
        ("cvqa_ja-jp", OPTIONS, "答えはBです。", "B"),
        ("m3exam_th", OPTIONS | {"background": [], "subject": "math"}, "ข้อ ข", "B"),
        ("xmmmu_hi", OPTIONS | {"question_type": "multiple-choice"}, "उत्तर: ख", "B"),
        ("xmmmu_hi", OPTIONS | {"question_type": "open", "answer": "18"}, "१८", [18.0]),
        ("marvl_tr", STATEMENT, "Doğru değil.", "false"),
        (
            "mgsm_es",
            {"question": "?", "answer": "18"},
            "La respuesta es 18 dólares en 2 días",
            "18",
        ),
        ("maxm_hi", {"question": "?", "answers": ["2"], "images": []}, "२", "2"),
        ("tydiqa_ar", {"context": "", "question": "?", "answers": ["1948"]}, "١٩٤٨", "1948"),
        ("xgqa_de", {"question": "?", "answer": "cat", "images": []}, "It is a cat.", "cat"),
    ],
)
def test_fixed_scores_use_the_readers(name, row, response, read):
    task = ALL_TASKS[name]
    scored = task.dataset.score(Document("1", row), response, task.subset, "fixed")
    assert scored.filtered == read
    assert scored.metrics[task.dataset.metric] == 1


def test_decimal_marks_are_those_of_cldr():
    babel = pytest.importorskip("babel", reason="the check of our table needs Babel")
    for code in LANGUAGES:
        try:
            symbols = babel.Locale.parse({"quz": "qu", "no": "nb"}.get(code, code)).number_symbols
        except babel.UnknownLocaleError:
            assert code == "min"
            continue
        symbols = symbols.get("latn", symbols)
        assert (symbols["decimal"] == ",") == (code in numbers.COMMA), code


# What `fixed` reads differently from `paper` in the 847 multiple-choice and 53 open answers of MMMU's llava1.5_13b:
# (the answer's start, paper, fixed, why).
DIFFERENT = [
    ("A) Josef Albers", None, "A", "paper does not know a letter before a bracket"),
    ("C) Schachter-Singer Theory", None, "C", "the same"),
    ("(A) 20.0%,0.50 mol", "D", None, "the answer repeats all options; paper takes the last"),
]


def test_real_answers_of_mmmu(bench, read_jsonl):
    different = []
    for row in read_jsonl(bench / "mmmu" / "val_outputs.jsonl.gz"):
        response = row["response"]
        if row["question_type"] == "multiple-choice":
            keys, named = row["all_choices"], row["index2ans"]
            paper = mmmu.parse_multiple_choice(response, keys, named, seed=None)
            fixed = letter(response, [named[key] for key in keys], "en")
        else:
            paper = mmmu.open_is_correct(row["answer"], mmmu.parse_open(response))
            fixed = mmmu.open_is_correct(row["answer"], xmmmu.open_candidates(response, "en"))
        if paper != fixed:
            different.append((response, paper, fixed))
    different.sort(key=lambda found: found[0].startswith("(A)"))
    assert len(different) == len(DIFFERENT)
    for (response, paper, fixed), (start, *readings, _) in zip(different, DIFFERENT, strict=True):
        assert response.startswith(start)
        assert [paper, fixed] == readings


def _all_readers(text: str, language: str | None) -> list:
    return [
        letter(text, FOUR, language),
        letter(text, ["8", "-8", "C++", "ข"], language),
        truth(text, language),
        number(text, language),
        plain(short(text, language), language),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("\x00", "\ud800", "B\ud800", "\u200f", "\u200d" * 99, "\u202eB\u202c", "\ufeff", "\x1b[1mB"),
        *("\\boxed{", "\\boxed{}", "\\boxed{{{{", "<answer>", "<answer></answer>", "</think>", "{,}"),
        *("½", "１／０", "1/0", "-", "−", "٫", "٬", "9" * 5000, "1." * 3000, "²", "፻", "௲", "万", "〇"),
        *("İ" * 99, "ß", "ﬁ", "ŉ", "ΐ", "e\u0301" * 99, "\u0301" * 500, "각" * 99, "👩‍👩‍👧", "🅱️"),
        *("(" * 999, "A." * 999, "not " * 999, "*" * 999, "#" * 999, "`" * 999, "_" * 999, "\n" * 999),
    ],
)  # fmt: skip
def test_bad_input_is_no_error(text):
    for language in ("en", "tr", "ar", "zh", "th", None):
        _all_readers(text, language)


def test_invisible_characters_change_nothing():
    for marked in ("\u200fB\u200f", "B\u200d", "\ufeffB", "B\x00", "\u202aB\u202c", "B\ud800"):
        assert letter(marked, FOUR, "ar") == "B", ascii(marked)
    assert number("\u200f1\u200d8", "ar") == 18
    assert truth("tr\u00adue\u200b", "en") == "true"


def test_any_text_is_no_error():
    """Random pieces of the corpus and of Unicode."""
    drawn = random.Random(0)
    pieces = [row["answer"] for rows in _corpus().values() for row in rows]
    for _ in range(400):
        parts = drawn.choices(pieces, k=3)
        parts.append("".join(chr(drawn.randrange(0x110000)) for _ in range(12)))
        drawn.shuffle(parts)
        text = drawn.choice(("", " ", "\n", "\u200b")).join(parts)
        start = drawn.randrange(len(text))
        _all_readers(
            text[start : start + drawn.randrange(1, 200)], drawn.choice([*LANGUAGES, None])
        )


ENDLESS = [
    *("x", "B ", "The answer is B. ", "A, B and ", "答えはBです。", "(", "a b c d ", "not ", "Not A. ", "उत्तर "),
    *("1,", "12 ", "1/", "9", "cat ", "true ", "正しくない", "no, ", "(a) false ", "\\boxed{", "<answer>", "*", "A."),
    *("۱٬", "ที่", "e\u0301", "\u200d", "一", "½", "it is ", "answer ", "$", "-", "\t", "[A] ", "A\n", "İ", "ا", "가"),
]  # fmt: skip


@pytest.mark.parametrize("piece", ENDLESS)
def test_no_pattern_is_catastrophic(piece):
    """A reader takes about 8 ms for 10 kB. A pattern that tries all combinations would take seconds or days."""
    text = (piece * 10_000)[:10_000]
    readers = {
        "letter": lambda code: letter(text, FOUR, code),
        "truth": lambda code: truth(text, code),
        "number": lambda code: number(text, code),
        "short": lambda code: same_value(short(text, code), code),
    }
    for name, read in readers.items():
        for code in ("en", "zh", "hi", "ar", None):
            read(code)  # compiles the patterns
            start = time.process_time()
            read(code)
            spent = time.process_time() - start
            print(f"{name} {code}: {1e3 * spent:.1f} ms")
            assert spent < 0.5, (name, code)


def test_a_megabyte_is_read_at_its_ends():
    start = time.process_time()
    assert letter("The answer is B.\n" + "x" * 1_000_000, FOUR, "en") == "B"
    assert letter("x" * 1_000_000 + "\nThe answer is B.", FOUR, "en") == "B"
    assert number("7 " * 500_000 + "\nThe answer is 18.", "en") == 18
    assert truth("true\n" + " " * 1_000_000, "en") == "true"
    assert short("cat\n" + "é" * 1_000_000, "fr") == "cat"
    assert time.process_time() - start < 1
