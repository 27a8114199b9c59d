"""MGSM: 250 grade-school problems in 11 languages, answered step by step (juletxara/mgsm)."""

import re
import string
from types import MappingProxyType

from eval.bench import task
from eval.bench.metrics import numbers
from eval.bench.reading.number import number

# language: (label of the question, label of the step-by-step answer, strict pattern), those of lm-eval's
# mgsm_native_cot. Its strict pattern for Bengali is the English one, so the paper's score
# for Bengali is 0.0 for every model.
_NUMBER = r"(\-?[0-9\.\,]+)"
_WORDS = {
    "bn": ("প্রশ্ন:", "ধাপে ধাপে উত্তর:", f"The answer is {_NUMBER}"),
    "de": ("Frage:", "Schritt-für-Schritt-Antwort:", f"Die Antwort lautet {_NUMBER}"),
    "en": ("Question:", "Step-by-Step Answer:", f"The answer is {_NUMBER}"),
    "es": ("Pregunta:", "Respuesta paso a paso:", f"La respuesta es {_NUMBER}"),
    "fr": ("Question :", "Réponse étape par étape :", f"La réponse est {_NUMBER}"),
    "ja": ("問題：", "ステップごとの答え:", f"答えは{_NUMBER}です。"),
    "ru": ("Задача:", "Пошаговоерешение:", f"Ответ — {_NUMBER}"),
    "sw": ("Swali:", "Jibu la Hatua kwa Hatua:", f"Jibu ni {_NUMBER}"),
    "te": ("ప్రశ్న:", "దశలవారీగా సమాధానం:", f"సమాధానం {_NUMBER}"),
    "th": ("โจทย์:", "คำตอบทีละขั้นตอน:", f"คำตอบคือ {_NUMBER}"),
    "zh": ("问题：", "逐步解答:", f"答案是 {_NUMBER}。"),
}
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Mgsm(task.Dataset):
    name, title, group = "mgsm", "MGSM", "text"
    hub, hub_config, hub_split = "juletxara/mgsm", "{}", "test"
    version = 2
    changes = MappingProxyType({2: "the number that the answer gives is read, in every language"})
    metric = "exact_match"
    subsets = task.language_subsets(dict.fromkeys(_WORDS, 250))
    fields = task.schema(question=str, answer=(str, int))
    structural_zeros = MappingProxyType(
        {"bn": "the paper's strict pattern for Bengali is an English one"}
    )

    def from_hub(self, row, subset, index):
        answer = str(row["answer_number"])
        return {"id": str(index), "question": row["question"], "answer": answer}

    def problem(self, row):
        try:
            numbers.parse(str(row["answer"]))
        except ValueError as error:
            return f"answer: {error}"
        return None

    def prompt(self, document, subset, profile):
        question_label, answer_label, *_ = _WORDS[subset.language]
        return task.Prompt(f"{question_label} {document.row['question']}\n{answer_label}")

    def generation_for(self, subset):
        until = (_WORDS[subset.language][0], "</s>", "<|im_end|>")
        return task.Generation(max_new_tokens=256, until=until, chat=False)

    def score(self, document, response, subset, profile, reply=None):
        gold = str(document.row["answer"])
        if profile == "paper":
            found = re.findall(_WORDS[subset.language][2], response)
            filtered = found[0] if found else "[invalid]"
            # lm-eval's exact_match removes punctuation from both sides: 18.00 becomes 1800, -5 becomes 5.
            right = filtered.translate(_PUNCTUATION) == gold.translate(_PUNCTUATION)
        else:
            value = number(task.answer_text(response), subset.language)
            filtered = None if value is None else str(value)
            right = value == numbers.parse(gold)
        unreadable = filtered in (None, "[invalid]")
        return self.mean_score(filtered, exact_match=right, unreadable=unreadable)


DATASET = Mgsm()
