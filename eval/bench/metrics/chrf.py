"""chrF of a corpus (Popović 2015) by sacrebleu, from summed counts, so that a bootstrap draw only sums them."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from sacrebleu.metrics import CHRF


@functools.cache
def _chrf() -> CHRF:
    # chrF, as in the paper and in lm-eval, although lm-eval's docstring says chrF++.
    return CHRF()


def counts(hypothesis: str, references: Sequence[str]) -> tuple[float, ...]:
    """The counts of n-grams of a sentence, against the reference that fits best."""
    found = _chrf()._extract_corpus_statistics([hypothesis], [[text] for text in references])[0]
    return tuple(float(count) for count in found)


def score(sums: Sequence[float]) -> float:
    """chrF, 0 to 100, of counts or of their sum."""
    return _chrf()._compute_score_from_stats([*sums]).score


def combine(sums: Float[np.ndarray, "*draws counts"]) -> Float[np.ndarray, "*draws"]:
    """chrF of each draw; NaN where nothing was drawn."""
    flat = np.asarray(sums).reshape(-1, np.shape(sums)[-1])
    scores = [score(row.tolist()) if row.any() else np.nan for row in flat]
    return np.array(scores).reshape(np.shape(sums)[:-1])
