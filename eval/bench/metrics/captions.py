"""ROUGE-L and CIDEr of captions: the values of pycocoevalcap, without its Java."""

import collections
import functools
import math
import unicodedata
from collections.abc import Sequence

import numpy as np
import regex
from jaxtyping import Float

from eval.bench.metrics import ptb
from eval.bench.reading.text import shorten

Tokens = Sequence[str]
ROUGE_BETA = 1.2
CIDER_ORDERS = 4
CIDER_SIGMA = 6.0
# Scripts written without spaces between words.
UNSEGMENTED = frozenset({"zh", "ja", "th", "my", "km", "lo"})


def rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """F measure of the longest common subsequence, with the recall weighted by 1.2 squared.

    Precision and recall are each the best over the references, so they may come from two of them. An empty caption is
    one empty token, as in `"".split(" ")`.
    """
    candidate = candidate or [""]
    references = [reference or [""] for reference in references]
    lengths = [_common_subsequence(candidate, reference) for reference in references]
    precision = max(length / len(candidate) for length in lengths)
    recall = max(length / len(ref) for length, ref in zip(lengths, references, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_subsequence(first: Tokens, second: Tokens) -> int:
    """Its length; a bit for each token of `first`, as in Hyyrö 2004: a zero where the length grows."""
    places: dict[str, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    ones = (1 << len(first)) - 1
    row = ones
    for token in second:
        same = row & places.get(token, 0)
        row = (row + same | row - same) & ones
    return len(first) - row.bit_count()


def cider(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> Float[np.ndarray, " documents"]:
    """CIDEr-D of each caption; the document frequencies come from these references."""
    counted_references = [[_ngrams(ref) for ref in refs] for refs in references]
    frequency = collections.Counter(
        ngram for refs in counted_references for ngram in set().union(*refs)
    )
    log_documents = math.log(max(len(references), 1))
    vector = functools.partial(_tf_idf, frequency=frequency, log_documents=log_documents)
    scores = []
    for candidate, refs in zip(candidates, counted_references, strict=True):
        ours = vector(_ngrams(candidate))
        similarity = [_similarity(ours, vector(ref)) for ref in refs]
        scores.append(10 * float(np.mean(similarity)))
    return np.array(scores)


def _ngrams(tokens: Tokens) -> collections.Counter:
    tokens = " ".join(tokens).split()  # here a no-break space ends a word, but not in ROUGE-L
    return collections.Counter(
        tuple(tokens[i : i + order])
        for order in range(1, CIDER_ORDERS + 1)
        for i in range(len(tokens) - order + 1)
    )


def _tf_idf(counts, *, frequency, log_documents):
    """(weights and norm for each order, number of bigrams). CIDEr-D takes the bigrams as the length."""
    weights = [{} for _ in range(CIDER_ORDERS)]
    for ngram, count in counts.items():
        idf = log_documents - math.log(max(1.0, frequency[ngram]))
        weights[len(ngram) - 1][ngram] = count * idf
    norms = [math.sqrt(sum(w * w for w in order.values())) for order in weights]
    return weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(ours, theirs) -> float:
    """The mean over the orders of the clipped cosine, smaller if the lengths differ."""
    damping = math.exp(-((ours[2] - theirs[2]) ** 2) / (2 * CIDER_SIGMA**2))
    total = 0.0
    for mine, other, my_norm, other_norm in zip(
        ours[0], theirs[0], ours[1], theirs[1], strict=True
    ):
        product = sum(min(w, other[g]) * other[g] for g, w in mine.items() if g in other)
        norm = my_norm * other_norm
        total += damping * (product / norm if norm else product)
    return total / CIDER_ORDERS


def caption_tokens(text: str, language: str) -> list[str]:
    """The tokens of a caption, segmented if the script has no spaces.

    Chinese, Japanese, Thai, Burmese, Khmer and Lao are cut into grapheme clusters, which needs no dictionary and treats
    response and reference in the same way; words of other scripts stay whole. All other languages have the tokens of
    the COCO metrics.
    """
    text = shorten(unicodedata.normalize("NFC", text), ptb.LIMIT)
    if language not in UNSEGMENTED:
        return ptb.tokenize(text)
    spaceless = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Myanmar}\p{Khmer}\p{Lao}]"
    tokens = []
    for word in regex.findall(r"[\p{L}\p{M}\p{N}ー]+", text.lower()):
        for run in regex.findall(rf"(?:{spaceless}|\p{{M}}|ー)+|(?:(?!{spaceless})\X)+", word):
            tokens += regex.findall(r"\X", run) if regex.match(rf"{spaceless}|ー", run) else [run]
    return tokens
