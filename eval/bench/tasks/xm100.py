"""XM100: one-sentence captions of 100 pictures in 36 languages (neulab/PangeaBench-xm100)."""

import unicodedata
from types import MappingProxyType

from eval.bench import task
from eval.bench.metrics import captions, ptb
from pangea_jax import languages

# The paper prints 0 to 0.3 for most of these six languages and several models. A run over exactly these languages
# explains that, see `_tokens`.
_SPACES_LOST = frozenset({"te", "th", "tr", "uk", "vi", "zh"})
_NAMES = {"quz": "Quechua"}


class Xm100(task.Dataset):
    name, title, group = "xm100", "XM100", "multimodal"
    hub = "neulab/PangeaBench-xm100"
    version = 2
    metric = "rouge_l"
    subsets = task.language_subsets(dict.fromkeys(languages.XM100, 100))
    fields = task.schema(captions=list, images=list)
    gold = "captions"
    generation = task.Generation(max_new_tokens=128)
    structural_zeros = MappingProxyType(
        dict.fromkeys(
            ("te", "tr", "uk", "vi"),
            "the paper's scorer removed the spaces from the model's captions but not from the references",
        )
        | dict.fromkeys(
            ("ja", "th", "zh"),
            "the paper's scorer does not segment the script, so that a caption is one to three tokens",
        )
    )

    def from_hub(self, row, subset, index):
        captions = row.get("captions", row.get("caption"))
        captions = [captions] if isinstance(captions, str) else list(captions)
        return {"id": str(row["image_id"]), "captions": captions, "images": [row["image"]]}

    def prompt(self, document, subset, profile):
        language = subset.language
        name = _NAMES.get(language, languages.get(language).english_name)
        suffix = "" if language == "en" else f" in {name}"
        return task.Prompt(
            f"Provide a one-sentence caption for the provided image{suffix}.", document.images
        )

    def score(self, document, response, subset, profile, reply=None):
        candidate, references = self._tokens(document, response, subset, profile)
        return self.mean_score(" ".join(candidate), rouge_l=captions.rouge_l(candidate, references))

    def _tokens(self, document, response, subset, profile):
        texts = document.row["captions"]
        if profile == "fixed":
            candidate, *references = (
                captions.caption_tokens(text, subset.language)
                for text in (task.answer_text(response), *texts)
            )
            return candidate, references
        # The paper's harness (neulab/Pangea, xm100/utils.py) normalises predictions to NFC, but not references. If the
        # run includes xm100_zh or xm100_th, it removes the spaces of the predictions in all languages.
        prediction = unicodedata.normalize("NFC", response)
        if subset.language in _SPACES_LOST:
            prediction = "".join(prediction.split())
        return ptb.tokenize(prediction), [ptb.tokenize(text) for text in texts]

    def corpus_metrics(self, documents, filtered, subset, profile):
        tokens = [self._tokens(document, "", subset, profile)[1] for document in documents]
        values = captions.cider([text.split(" ") for text in filtered], tokens)
        return {"cider": float(values.mean())} if len(values) else {}


DATASET = Xm100()
