"""FLORES-Sub: FLORES-200 devtest between English and ten languages, both ways (facebook/flores).

The paper says 18K items, which would be nine pairs. Its tables have ten languages, so this data set has ten pairs. The
paper does not print its prompt; ours is a plain one.
"""

from eval.bench import task
from eval.bench.metrics import chrf
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
        counts = chrf.counts(hypothesis, [document.row["target"]])
        return task.Scored(hypothesis, {"chrf": chrf.score(counts) / 100}, counts)

    def combine(self, sums, profile):
        return chrf.combine(sums)


DATASET = Flores()
