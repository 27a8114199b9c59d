"""Token F1 and exact match of SQuAD v1."""

import collections
import re
import string
import unicodedata
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str, *, unicode_punctuation: bool = False, articles: bool = True) -> str:
    """Lower case without punctuation and English articles.

    Args:
      unicode_punctuation: remove the punctuation of every script. SQuAD's own script removes ASCII only.
      articles: remove `a`, `an` and `the`. They are other words in other languages.
    """
    text = text.lower()
    if unicode_punctuation:
        text = unicodedata.normalize("NFKC", text)
        text = "".join(c for c in text if unicodedata.category(c)[0] != "P")
    else:
        text = text.translate(_ASCII_PUNCTUATION)
    return " ".join((_ARTICLES.sub(" ", text) if articles else text).split())


def f1(prediction: str, reference: str) -> float:
    """F1 of the words of two normalised texts, in any order."""
    predicted, gold = prediction.split(), reference.split()
    common = sum((collections.Counter(predicted) & collections.Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold)) if common else 0.0


def scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """F1, exact match, and whether the prediction contains a reference; the best over the references."""
    return {
        "f1": max(f1(prediction, reference) for reference in references),
        "exact_match": float(prediction in references),
        "contains": float(any(reference in prediction for reference in references if reference)),
    }
