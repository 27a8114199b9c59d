"""An endless answer costs milliseconds in every task and profile, whatever it repeats."""

import time

import pytest

from eval.bench.task import Document
from eval.bench.tasks import DATASETS
from tests.fuzz.rows import ROWS

PIECES = (
    "1 000 ",
    "answer is ",
    "1",
    "1.",
    "A. ",
    "a'",
    "p.p. ",
    "<a b='",
    "<",
    "\\boxed{",
    "é",
    "答案是",
    "\n",
    " ",
)
SIZE = 90_000
# With what it takes to read 90 kB at all; of the processor, so that other work on the machine does not count.
SECONDS = 1.0


@pytest.mark.parametrize("profile", ["paper", "fixed"])
@pytest.mark.parametrize("name", ROWS)
def test_endless_answers(name, profile):
    dataset = DATASETS[name.partition(" ")[0]]
    document = Document("d", ROWS[name])
    subset = dataset.subsets[-1]
    dataset.score(document, "a 1", subset, profile, "7 8")  # compiles the patterns
    for piece in PIECES:
        text = (piece * SIZE)[:SIZE]
        began = time.process_time()
        dataset.score(document, text, subset, profile, "7 8")
        spent = time.process_time() - began
        assert spent < SECONDS, f"{piece!r}: {spent:.2f} s"


@pytest.mark.parametrize("name", ["xchat", "m_llavabench"])
def test_endless_replies_of_a_judge(name):
    for piece in (*PIECES, "[RESULT] ", "score of ", "score 3 ", "8 9 ", "/ "):
        text = (piece * SIZE)[:SIZE]
        began = time.process_time()
        DATASETS[name].readable(text)
        assert time.process_time() - began < SECONDS, piece
