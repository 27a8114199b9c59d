"""xGQA: 9,666 questions on 300 pictures in eight languages, answered in English (neulab/PangeaBench-xgqa)."""

from eval.bench import task
from eval.bench.metrics import squad

_LANGUAGES = ("en", "bn", "de", "id", "ko", "pt", "ru", "zh")


class Xgqa(task.Dataset):
    name, title, group = "xgqa", "xGQA", "multimodal"
    hub = "neulab/PangeaBench-xgqa"
    metric = "exact_match"
    subsets = task.language_subsets(dict.fromkeys(_LANGUAGES, 9666))
    fields = task.schema(question=str, answer=str, images=list)
    generation = task.Generation(max_new_tokens=16)

    def prompt(self, document, subset, profile):
        # One line: the harness strips the line break its own template begins with.
        request = "Answer the question using a single word or phrase"
        request += "." if subset.language == "en" else " in English."
        return task.Prompt(f"{document.row['question'].strip()} {request}", document.images)

    def score(self, document, response, subset, profile, reply=None):
        gold = document.row["answer"]
        if profile == "paper":
            # The paper's rule (neulab/Pangea, xgqa/utils.py): the answer anywhere in the response, so that "woman" is
            # right for "man" and "snow" for "no".
            read = response.strip().lower()
            return task.mean_of(
                {"exact_match": float(gold.strip().lower() in read)}, "exact_match", read
            )
        read = squad.normalize(task.answer_text(response), unicode_punctuation=True)
        gold = squad.normalize(gold, unicode_punctuation=True)
        metrics = {
            "exact_match": float(read == gold),
            "contains_words": float(f" {gold} " in f" {read} "),
        }
        return task.mean_of(metrics, "exact_match", read)


DATASET = Xgqa()
