"""FLORES-Sub: FLORES-200 devtest between English and ten languages, both ways (facebook/flores).

The paper says 18K items, which would be nine pairs. Its tables have ten languages, so this data set has ten pairs. The
paper does not print its prompt; ours is a plain one.
"""

import functools

import numpy as np
from sacrebleu.metrics import CHRF

from eval.bench import task
from pangea_jax import languages

CODES = {
    "en": "eng_Latn",
    "ar": "arb_Arab",
    "de": "deu_Latn",
    "fr": "fra_Latn",
    "he": "heb_Hebr",
    "hi": "hin_Deva",
    "id": "ind_Latn",
    "ja": "jpn_Jpan",
    "pt": "por_Latn",
    "ro": "ron_Latn",
    "tr": "tur_Latn",
}
_OTHERS = tuple(code for code in CODES if code != "en")


@functools.cache
def _chrf() -> CHRF:
    # chrF, as in the paper and in lm-eval, although lm-eval's docstring says chrF++.
    return CHRF()


class Flores(task.Dataset):
    name, title, group = "flores", "FLORES-Sub", "text"
    hub = "facebook/flores"
    metric = "chrf"
    # In the tables, x->en belongs to the English average and en->x to the other one.
    subsets = tuple(
        subset
        for code in _OTHERS
        for subset in (
            task.Subset(f"{code}-en", "en", "en", 1012),
            task.Subset(f"en-{code}", code, "mul", 1012),
        )
    )
    fields = task.schema(source=str, target=str)
    gold = "target"
    generation = task.Generation(max_new_tokens=256)

    def source(self, subset):
        return task.Source(self.hub, "-".join(map(CODES.get, subset.name.split("-"))), "devtest")

    def from_hub(self, row, subset, index):
        source, target = (row[f"sentence_{CODES[code]}"] for code in subset.name.split("-"))
        return {"id": str(row.get("id", index + 1)), "source": source, "target": target}

    def prompt(self, document, subset, profile):
        source, target = (languages.get(code).english_name for code in subset.name.split("-"))
        return task.Prompt(
            f"Translate the following {source} sentence to {target}.\n{document.row['source']}"
        )

    def score(self, document: task.Document, response: str, subset, profile, reply=None):
        lines = [line.strip() for line in task.answer_text(response).splitlines() if line.strip()]
        hypothesis = lines[0] if lines else ""
        # The score of a corpus follows from the summed n-gram counts, so a bootstrap draw only sums them.
        counts = _chrf()._extract_corpus_statistics([hypothesis], [[document.row["target"]]])[0]
        value = _chrf()._compute_score_from_stats(counts).score / 100
        return task.Scored(hypothesis, {"chrf": value}, tuple(float(count) for count in counts))

    def combine(self, sums, profile):
        flat = np.asarray(sums).reshape(-1, np.shape(sums)[-1])
        scores = [
            _chrf()._compute_score_from_stats(row.tolist()).score if row.any() else np.nan
            for row in flat
        ]
        return np.array(scores).reshape(np.shape(sums)[:-1])


DATASET = Flores()
