"""The lexer behind the caption metrics gives the tokens of Stanford's program.

ptb_tokens.jsonl has texts of our own in 56 languages, with the tokens that CoreNLP 3.4.1 gives for them.
"""

import random
import time
from pathlib import Path

import pytest
import regex

from eval.bench.metrics import ptb

TOKENS = Path(__file__).parent / "ptb_tokens.jsonl"


def test_tokens_in_many_languages(read_jsonl):
    rows = read_jsonl(TOKENS)
    assert len(rows) == 128
    wrong = {row["text"]: ptb.tokenize(row["text"]) for row in rows}
    assert wrong == {row["text"]: row["tokens"] for row in rows}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("pro-life anti-", ["pro-life", "anti-"]),  # the longest match, not the first rule
        ("etc.a etc.ab", ["etc.", "a", "etc.ab"]),  # what must follow a token counts for its length
        ("2013., u", ["2013.", "u"]),
        ("Vitamin C. The", ["vitamin", "c", "the"]),
        ("Vitamin C. the", ["vitamin", "c.", "the"]),
        ("Mass. mass.", ["mass.", "mass"]),  # letters in brackets are of one case
        ("ſimple's Mrſ.", ["ſimple", "'s", "mrſ."]),
        ("www.a.bc/d.ef,gh", ["www.a.bc/d.ef,gh"]),
        ("1 1/2 (555) 123-4567", ["1\xa01/2", "-lrb-555-rrb-\xa0123-4567"]),
        ("http://x.y/😀z 😀 a", ["http://x.y/😀z", "a"]),
        ("ΟΔΟΣ ΑΣ-ΒΣ 9Σ Α9Σ", ["οδος", "ασ-βς", "9σ", "α9ς"]),
    ],
)
def test_rules(text, tokens):
    assert ptb.tokenize(text) == tokens


def test_letters_are_those_of_unicode_6():
    """A newer Unicode in the library regex has more letters, which the program drops."""
    for characters, count in ((ptb._LETTER, 48_462), (ptb._DIGIT, 350)):
        known = regex.compile(f"[{characters}]", regex.V1)
        assert sum(known.match(chr(code)) is not None for code in range(0x10000)) == count


@pytest.mark.parametrize(
    "piece",
    ["a", "a,", "a-", "l'", "&", "<a b='", "漢", "a@", "a@b.", "www.a/", "1 ", "+", "a=b", "\ud800",
     "😀", "\u200f", "\u00ad", "\x00", "Σ", "ΑΣ-", "A&amp;", "U.S.-", " "],
)  # fmt: skip
def test_long_and_odd_texts(piece):
    start = time.process_time()
    assert isinstance(ptb.tokenize(piece * (10_000 // len(piece))), list)
    assert time.process_time() - start < 2  # 0.1 s on an idle machine


def test_any_text_has_tokens():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            chr(rng.choice((rng.randrange(0x250), rng.randrange(0x110000)))) for _ in range(30)
        )
        assert all(token and " " not in token for token in ptb.tokenize(text))
