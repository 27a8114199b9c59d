"""XStoryCloze: which of two sentences ends a story, in 11 languages, by log-likelihood (juletxara/xstory_cloze)."""

from eval.bench.metrics import continuations
from eval.bench.task import Dataset, Generation, Prompt, language_subsets, schema

_LANGUAGES = ("en", "ar", "es", "eu", "hi", "id", "my", "ru", "sw", "te", "zh")


class XStoryCloze(Dataset):
    name, title, group = "xstorycloze", "XStoryCloze", "text"
    hub = "juletxara/xstory_cloze"
    subsets = language_subsets(dict.fromkeys(_LANGUAGES, 1511))
    fields = schema(sentences=list, endings=list, answer=int)
    generation = Generation(output_type="loglikelihood", chat=False)

    def problem(self, row):
        places = range(len(row["endings"]))
        return None if row["answer"] in places else f"answer {row['answer']} is not in {[*places]}"

    def prompt(self, document, subset, profile):
        return Prompt(" ".join(document.row["sentences"]))

    def choices(self, document):
        # The space is lm-eval's; Chinese and Burmese would do better without one.
        return tuple(f" {ending}" for ending in document.row["endings"])

    def score(self, document, response, subset, profile, reply=None):
        return continuations.score(response, self.choices(document), document.row["answer"])


DATASET = XStoryCloze()
