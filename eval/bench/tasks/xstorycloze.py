"""XStoryCloze: which of two sentences ends a story? In 11 languages, by log-likelihood (juletxara/xstory_cloze)."""

from eval.bench.metrics import continuations
from eval.bench.task import Dataset, Generation, Prompt, language_subsets, schema

_LANGUAGES = ("en", "ar", "es", "eu", "hi", "id", "my", "ru", "sw", "te", "zh")


class XStoryCloze(Dataset):
    name, title, group = "xstorycloze", "XStoryCloze", "text"
    hub, hub_config, hub_split = "juletxara/xstory_cloze", "{}", "eval"
    subsets = language_subsets(dict.fromkeys(_LANGUAGES, 1511))
    fields = schema(sentences=list, endings=list, answer=int)
    generation = Generation(output_type="loglikelihood", chat=False)

    def from_hub(self, row, subset, index):
        return {
            "id": str(row.get("story_id", index)),
            "sentences": [row[f"input_sentence_{i}"] for i in range(1, 5)],
            "endings": [row["sentence_quiz1"], row["sentence_quiz2"]],
            "answer": int(row["answer_right_ending"]) - 1,
        }

    def problem(self, row):
        places = range(len(row["endings"]))
        return None if row["answer"] in places else f"answer {row['answer']} is not in {[*places]}"

    def prompt(self, document, subset, profile):
        return Prompt(" ".join(document.row["sentences"]))

    def choices(self, document):
        # lm-eval puts a space before every ending. Chinese and Burmese would score better without it.
        return tuple(f" {ending}" for ending in document.row["endings"])

    def score(self, document, response, subset, profile, reply=None):
        return continuations.score(self, response, self.choices(document), document.row["answer"])


DATASET = XStoryCloze()
