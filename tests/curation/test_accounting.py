"""Counts of records, and the tables that they are reported in."""

import json
import re

import pytest

from pangea_jax.curation.accounting import Accounting, AccountingError, Dropped
from pangea_jax.figures.markdown import cell


def test_counts_merge_and_survive_json():
    counts = Accounting(entered=5, left=3)
    counts.count(Dropped("a", "size", "small"))
    counts.count(Dropped("b", "size", "small", count=1))
    counts.check("here")
    other = Accounting.from_json(json.loads(json.dumps(counts.to_json())))
    assert other == counts
    other.merge(counts)
    assert (other.entered, other.left, other.num_dropped) == (10, 6, 4)
    other.left -= 1
    with pytest.raises(AccountingError):
        other.check("here")


@pytest.mark.parametrize("text", ["a|b", "a\\|b", "a\nb|\r\n| c |", "\\"])
def test_no_text_breaks_a_table(text):
    line = f"| {cell(text)} | 2 |"
    assert len(line.splitlines()) == 1
    # As CommonMark's tables are split: a backslash takes the character behind it.
    cells = re.findall(r"\| ((?:\\.|[^|\\])*)(?= \|)", line)
    assert [re.sub(r"\\(.)", r"\1", found) for found in cells] == [" ".join(text.split()), "2"]
