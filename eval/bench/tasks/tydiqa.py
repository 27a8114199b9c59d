"""TyDiQA: extractive questions on a given passage in nine languages, GoldP dev (neulab/PangeaBench-tydiqa).

The paper does not print its prompt; these are the templates of open-instruct and OpenCompass, without examples. The
printed "accuracy" is no count over the size of the set: it is token F1.
"""

from eval.bench import task
from eval.bench.metrics import squad

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
    hub = "neulab/PangeaBench-tydiqa"
    metric = "f1"
    subsets = task.language_subsets(_SIZES)
    fields = task.schema(context=str, question=str, answers=list)
    gold = "answers"
    generation = task.Generation(max_new_tokens=50)

    def prompt(self, document, subset, profile):
        instruction = _INSTRUCTIONS[subset.language]
        passage, question, answer = _LABELS[subset.language]
        row = document.row
        return task.Prompt(
            f"{instruction}\n\n{passage} {row['context']}\n{question} {row['question']}\n{answer}"
        )

    def score(self, document, response, subset, profile, reply=None):
        lines = task.answer_text(response).splitlines()
        first_line = lines[0] if lines else ""
        options = {}
        if profile == "fixed":
            # SQuAD's script leaves ។ 。 ؟ and the like on words, and drops the Finnish word "an" with the articles.
            options = {"unicode_punctuation": True, "articles": subset.language == "en"}
        prediction = squad.normalize(first_line, **options)
        golds = [squad.normalize(answer, **options) for answer in document.row["answers"]]
        return task.mean_of(squad.scores(prediction, golds), "f1", prediction)


DATASET = TyDiQA()
