"""xGQA: 9,666 questions on 300 pictures in eight languages, answered in English (neulab/PangeaBench-xgqa)."""

from types import MappingProxyType

from eval.bench import task
from eval.bench.reading.short import same_value, short

_LANGUAGES = ("en", "bn", "de", "id", "ko", "pt", "ru", "zh")


class Xgqa(task.Dataset):
    name, title, group = "xgqa", "xGQA", "multimodal"
    hub = "neulab/PangeaBench-xgqa"
    version = 2
    changes = MappingProxyType({2: "the phrase that answers is read"})
    metric = "exact_match"
    subsets = task.language_subsets(dict.fromkeys(_LANGUAGES, 9666))
    fields = task.schema(question=str, answer=str, images=list)
    generation = task.Generation(max_new_tokens=16)

    def from_hub(self, row, subset, index):
        names = ("question", "answer")
        return {"id": str(index), **{name: row[name] for name in names}, "images": [row["image"]]}

    def prompt(self, document, subset, profile):
        # All on one line: the paper's harness strips the line break at the start of its template.
        request = "Answer the question using a single word or phrase"
        request += "." if subset.language == "en" else " in English."
        return task.Prompt(f"{document.row['question'].strip()} {request}", document.images)

    def score(self, document, response, subset, profile, reply=None):
        gold = document.row["answer"]
        if profile == "paper":
            # The paper's rule (neulab/Pangea, xgqa/utils.py): the answer may stand anywhere in the response, so "woman"
            # is right for "man" and "snow" for "no".
            read = response.strip().lower()
            return self.mean_score(read, exact_match=gold.strip().lower() in read)
        text = task.answer_text(response)
        read, gold = same_value(short(text, "en"), "en"), same_value(gold, "en")
        found = f" {gold} " in f" {same_value(text, 'en')} "
        return self.mean_score(read, exact_match=read == gold, contains_words=found)


DATASET = Xgqa()
