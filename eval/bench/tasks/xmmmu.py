"""xMMMU: MMMU validation (college questions with pictures), and 300 of its questions in six translations.

neulab/PangeaBench-xmmmu. English has all 900 questions of MMMU validation, so en and mul have different questions.
"""

import ast
from types import MappingProxyType

from eval.bench import task
from eval.bench.metrics import mmmu, numbers
from eval.bench.reading.letter import letter
from eval.bench.reading.mentions import LETTERS
from eval.bench.reading.number import number
from eval.bench.reading.text import clean
from eval.bench.tasks.m3exam import numbered_pictures, place_images

_SIZES = {"en": 900, "ar": 298, "fr": 298, "hi": 291, "id": 297, "ja": 269, "pt": 297}


class Xmmmu(task.Dataset):
    name, title, group = "xmmmu", "xMMMU", "multimodal"
    hub = "neulab/PangeaBench-xmmmu"
    version = 3
    changes = MappingProxyType({3: "letters and numbers are read in every language"})
    subsets = task.language_subsets(_SIZES)
    fields = task.schema(
        question=str, options=list, answer=(str, list), question_type=str, images=list
    )
    generation = task.Generation(max_new_tokens=16)

    def from_hub(self, row, subset, index):
        options, answer = row["options"], row["answer"]
        if isinstance(options, str):
            options = ast.literal_eval(options.replace("\n", " ")) if options.strip() else []
        if isinstance(answer, str) and answer.startswith("["):
            answer = ast.literal_eval(answer)
        return {
            "id": str(row["id"]),
            "question": row["question"],
            "options": [str(option) for option in options],
            "answer": answer,
            "question_type": row["question_type"],
            "images": numbered_pictures(row, range(1, 8)),
        }

    def problem(self, row):
        if row["question_type"] == "multiple-choice" and not row["options"]:
            return "a multiple-choice question without options"
        return None

    def prompt(self, document, subset, profile):
        row = document.row
        if row["question_type"] == "multiple-choice":
            options = "\n".join(f"{k}. {text}" for k, text in zip(LETTERS, row["options"]))
            # The paper writes "option letter", MMMU itself "option's letter".
            request = f"{options}\nAnswer with the option letter from the given choices directly."
        else:
            request = "Answer the question using a single word or phrase."
        return place_images(f"{row['question']}\n{request}", document)

    def score(self, document: task.Document, response: str, subset, profile, reply=None):
        row = document.row
        if row["question_type"] != "multiple-choice":
            if profile == "paper":
                candidates = mmmu.parse_open(response)
            else:
                candidates = open_candidates(task.answer_text(response), subset.language)
            right = mmmu.open_is_correct(row["answer"], candidates)
            return self.mean_score(candidates, acc=right, unreadable=0)
        letters = LETTERS[: len(row["options"])]
        if profile == "paper":
            named = dict(zip(letters, row["options"]))
            chosen = mmmu.parse_multiple_choice(response, letters, named, seed=None)
            unreadable = chosen is None
            if unreadable:
                seed = f"{self.name}_{subset.name}/{document.id}"
                chosen = mmmu.parse_multiple_choice(response, letters, named, seed=seed)
        else:
            text = task.answer_text(response)
            chosen = letter(text, row["options"], subset.language)
            unreadable = chosen is None
        return self.mean_score(chosen, acc=chosen == row["answer"], unreadable=unreadable)


def open_candidates(text: str, language: str) -> list[str | float]:
    """MMMU's candidates, with the digits of any script, and the number that the answer gives in its language."""
    candidates = mmmu.parse_open(numbers.ascii_digits(clean(text)))
    value = number(text, language)
    given = [] if value is None or abs(value) > 10**30 else [round(float(value), 2)]
    return list(dict.fromkeys([*candidates, *given]))


DATASET = Xmmmu()
