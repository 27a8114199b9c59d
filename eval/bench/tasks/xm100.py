"""XM100: one-sentence captions of 100 pictures in 36 languages (neulab/PangeaBench-xm100)."""

import unicodedata
from types import MappingProxyType

from eval.bench import task
from eval.bench.metrics import captions, ptb
from pangea_jax import languages

# The printed tail of the table (0 to 0.3 in most, for several models) fits a run over these six languages.
_SPACES_LOST = frozenset({"te", "th", "tr", "uk", "vi", "zh"})
_NAMES = {"quz": "Quechua"}


class Xm100(task.Dataset):
    name, title, group = "xm100", "XM100", "multimodal"
    hub = "neulab/PangeaBench-xm100"
    metric = "rouge_l"
    subsets = task.language_subsets(dict.fromkeys(languages.XM100, 100))
    fields = task.schema(captions=list, images=list)
    gold = "captions"
    generation = task.Generation(max_new_tokens=128)
    structural_zeros = MappingProxyType(
        {
            **dict.fromkeys(
                ("te", "tr", "uk", "vi"),
                "the paper's scorer took the spaces out of the model's captions but not out of the references",
            ),
            **dict.fromkeys(
                ("ja", "th", "zh"),
                "the paper's scorer does not segment the script, so that a caption is one to three tokens",
            ),
        }
    )

    def prompt(self, document, subset, profile):
        language = subset.language
        name = _NAMES.get(language, languages.get(language).english_name)
        suffix = "" if language == "en" else f" in {name}"
        return task.Prompt(
            f"Provide a one-sentence caption for the provided image{suffix}.", document.images
        )

    def score(self, document, response, subset, profile, reply=None):
        candidate, references = self._tokens(document, response, subset, profile)
        value = captions.rouge_l(candidate, references)
        filtered = " ".join(candidate)
        return task.mean_of({"rouge_l": value}, "rouge_l", filtered)

    def _tokens(self, document, response, subset, profile):
        texts = document.row["captions"]
        if profile == "fixed":
            cut = captions.caption_tokens
            return cut(task.answer_text(response), subset.language), [
                cut(t, subset.language) for t in texts
            ]
        # Predictions are NFC-normalised, references are not (neulab/Pangea, xm100/utils.py). Its normalize() tests
        # whether xm100_zh or xm100_th is in the task list of the whole run and then joins tokens without spaces.
        prediction = unicodedata.normalize("NFC", response)
        if subset.language in _SPACES_LOST:
            prediction = "".join(prediction.split())
        return ptb.tokenize(prediction), [ptb.tokenize(text) for text in texts]

    def corpus_metrics(self, documents, filtered, subset, profile):
        tokens = [self._tokens(document, "", subset, profile)[1] for document in documents]
        values = captions.cider([text.split(" ") for text in filtered], tokens)
        return {"cider": float(values.mean())} if len(values) else {}


DATASET = Xm100()
