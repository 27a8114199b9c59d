"""TyDiQA: extractive questions on a given passage in nine languages, GoldP dev (neulab/PangeaBench-tydiqa).

The paper does not print its prompt; these are the templates of open-instruct and OpenCompass, without examples. Its
"accuracy" must be token F1, because no number of right answers gives the printed values.
"""

from collections.abc import Mapping
from types import MappingProxyType

from eval.bench import task
from eval.bench.metrics import squad
from eval.bench.reading.short import plain, short
from pangea_jax import languages

_INSTRUCTIONS = {
    "ar": "أجب على السؤال التالي بناءً على المعلومات في المقطع المعطى.",
    "bn": "প্রদত্ত অধ্যায়ের তথ্যের উপর ভিত্তি করে নিম্নলিখিত প্রশ্নের উত্তর দিন।",
    "en": "Answer the following question based on the information in the given passage.",
    "fi": "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.",
    "id": "Jawab pertanyaan berikut berdasarkan informasi di bagian yang diberikan.",
    "ko": "주어진 문단의 정보에 기반하여 다음 질문에 답하십시오.",
    "ru": "Ответьте на следующий вопрос на основе информации в данном отрывке.",
    "sw": "Jibu swali lifuatalo kulingana na habari kwenye kifungu kilichotolewa.",
    "te": "ఇచ్చిన పేరాలోని సమాచారం ఆధారంగా కింది ప్రశ్నకు సమాధానం ఇవ్వండి.",
}
# Labels of the passage, the question and the answer.
_LABELS = {
    "ar": ("المقطع:", "السؤال:", "الإجابة:"),
    "bn": ("অধ্যায়:", "প্রশ্ন:", "উত্তর:"),
    "en": ("Passage:", "Question:", "Answer:"),
    "fi": ("Kappale:", "Kysymys:", "Vastaus:"),
    "id": ("Bagian:", "Pertanyaan:", "Jawaban:"),
    "ko": ("문단:", "질문:", "답변:"),
    "ru": ("Отрывок:", "Вопрос:", "Ответ:"),
    "sw": ("Kifungu:", "Swali:", "Jibu:"),
    "te": ("పేరా:", "ప్రశ్న:", "సమాధానం:"),
}
_SIZES = {
    **{"en": 440, "ar": 921, "bn": 113, "fi": 782, "id": 565},
    **{"ko": 276, "ru": 812, "sw": 499, "te": 669},
}


class TyDiQA(task.Dataset):
    name, title, group = "tydiqa", "TyDiQA", "text"
    hub, hub_config, hub_split = "neulab/PangeaBench-tydiqa", "secondary_task", "validation"
    version = 2
    changes = MappingProxyType({2: "the phrase that answers is read; digits of every script"})
    metric = "f1"
    subsets = task.language_subsets(_SIZES)
    fields = task.schema(context=str, question=str, answers=list)
    gold = "answers"
    generation = task.Generation(max_new_tokens=50)

    def from_hub(self, row, subset, index):
        name = str(row["id"]).partition("-")[0]  # "swahili-123-1"
        if name != languages.get(subset.language).english_name.lower():
            return None
        answers = row["answers"]["text"] if isinstance(row["answers"], Mapping) else row["answers"]
        return {
            "id": str(row["id"]),
            "context": row["context"],
            "question": row["question"],
            "answers": list(dict.fromkeys(answers)),
        }

    def prompt(self, document, subset, profile):
        instruction = _INSTRUCTIONS[subset.language]
        passage, question, answer = _LABELS[subset.language]
        row = document.row
        return task.Prompt(
            f"{instruction}\n\n{passage} {row['context']}\n{question} {row['question']}\n{answer}"
        )

    def score(self, document, response, subset, profile, reply=None):
        text, references = task.answer_text(response), document.row["answers"]
        if profile == "fixed":
            # SQuAD's script leaves marks such as ។ 。 ؟ on words, removes the Finnish word "an" as an article, and
            # knows the digits 0-9 only.
            code = subset.language
            prediction = plain(short(text, code), code)
            golds = [plain(answer, code) for answer in references]
        else:
            prediction = squad.normalize(text.splitlines()[0] if text else "")
            golds = [squad.normalize(answer) for answer in references]
        return self.mean_score(prediction, **squad.scores(prediction, golds))


DATASET = TyDiQA()
