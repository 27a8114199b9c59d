"""M3Exam: questions with pictures from school exams in seven languages (neulab/PangeaBench-m3exam)."""

import itertools
import re
from types import MappingProxyType

from eval.bench import task
from eval.bench.reading.mentions import LETTERS
from eval.bench.tasks.cvqa import score_letter
from pangea_jax import languages

_HINTS = {
    "en": (
        "The following is a multiple choice question about {subject}. Please only respond with the letter (A, B, C, or "
        "D) corresponding to the correct answer, without any additional explanation."
    ),
    "zh": "以下是关于{subject}的单项选择题。 请仅给出正确选项对应的选项序号（A, B, C, 或 D） 而非其他细节。",
    "th": (
        "ต่อไปนี้เป็นคำถามแบบปรนัย วิชา{subject} โปรดตอบเพียงตัวอักษร (A, B, C หรือ D) "
        "ที่ตรงกับคำตอบที่ถูกต้อง โดยไม่ต้องมีคำอธิบายเพิ่มเติม"
    ),
    "vi": (
        "Sau đây là câu hỏi trắc nghiệm về {subject}. Vui lòng chỉ trả lời bằng chữ cái (A, B, C hoặc D) tương ứng với "
        "câu trả lời đúng, không cần giải thích thêm."
    ),
    "it": (
        "La seguente è una domanda a scelta multipla su {subject}. Si prega di rispondere solo con la lettera (A, B, C "
        "o D) corrispondente alla risposta corretta, senza alcuna spiegazione aggiuntiva."
    ),
    "af": (
        "Die volgende is 'n meervoudige keuse vraag oor {subject}. Antwoord asseblief slegs met die letter (A, B, C of "
        "D) wat ooreenstem met die korrekte antwoord, sonder enige bykomende verduideliking."
    ),
    "pt": (
        "A seguir está uma questão de múltipla escolha sobre {subject}. Por favor, responda apenas com a letra (A, B, "
        "C ou D) correspondente à resposta correta, sem qualquer explicação adicional."
    ),
}
_ANSWER_CUES = {
    "en": "Answer:",
    "zh": "答案：",
    "vi": "Câu trả lời:",
    "th": "คำตอบ:",
    "it": "La risposta:",
    "af": "Antwoord:",
    "pt": "Responder:",
}
_SUBJECTS = {
    "en": ("English", "Math", "Social Science", "Natural Science"),
    "zh": ("语文", "数学", "社会科学", "自然科学"),
    "th": ("ภาษาไทย", "คณิตศาสตร์", "สังคมศึกษา", "วิทยาศาสตร์"),
    "vi": ("Tiếng Việt", "Toán", "Khoa học xã hội", "Khoa học tự nhiên"),
    "it": ("Italiano", "Matematica", "Scienze sociali", "Scienze naturali"),
    "af": ("Afrikaans Huistaal", "Wiskunde", "Sosiale Wetenskappe", "Natuurwetenskap"),
    "pt": ("Linguagens", "Matemática", "Ciências Humanas", "Ciências da Natureza"),
}
_SUBJECT_KEYS = ("language", "math", "social-science", "natural-science")
_SIZES = {"en": 793, "zh": 433, "af": 163, "it": 397, "pt": 450, "th": 401, "vi": 116}
_MARK = re.compile(r"<image (\d+)>")
_HUB_MARK = re.compile(r"\(image\)\[(.*?)\]")
_LABEL = re.compile(r"^\s*[(（]?([A-Ja-j]|10|\d)\s*[)）.．、:：]\s*")


class M3Exam(task.Dataset):
    name, title, group = "m3exam", "M3Exam", "multimodal"
    hub = "neulab/PangeaBench-m3exam"
    version = 3
    changes = MappingProxyType(
        {3: "letters are read in every language, negations and options' texts included"}
    )
    subsets = task.language_subsets(_SIZES)
    fields = task.schema(
        question=str, options=list, answer=str, subject=str, background=list, images=list
    )
    generation = task.Generation(max_new_tokens=16)

    def source(self, subset):
        return task.Source(self.hub, None, languages.get(subset.name).english_name.lower())

    def from_hub(self, row, subset, index):
        """Marks `(image)[name]` become `<image 1>`, `<image 2>` ... in the order of background, question, options."""
        pictures = numbered_pictures(row, range(10))
        seen: dict[str, int] = {}

        def mark(match: re.Match) -> str:
            number = seen.setdefault(match.group(1), len(seen) + 1)
            return f"<image {number}>" if number <= len(pictures) else ""

        return {
            "id": str(row.get("id", index)),
            "background": [_HUB_MARK.sub(mark, text) for text in row["background_description"]],
            "question": _HUB_MARK.sub(mark, row["question_text"]),
            "options": [_HUB_MARK.sub(mark, text) for text in row["options"]],
            "answer": str(row["answer_text"]),
            "subject": row["subject_category"],
            "images": pictures,
        }

    def prompt(self, document, subset, profile):
        language, row = subset.language, document.row
        if row["subject"] not in _SUBJECT_KEYS:
            raise ValueError(
                f"m3exam {document.id}: subject is {row['subject']!r}, expected one of {_SUBJECT_KEYS}"
            )
        subject = _SUBJECTS[language][_SUBJECT_KEYS.index(row["subject"])]
        background = "\n" + "\n".join(row["background"]) if row["background"] else ""
        question, options = row["question"], _options(row["options"])
        if profile == "paper":
            # In the question, the first mark stands for all pictures, and the others are deleted. Marks in the
            # background stay as the exam writes them, which no wrapper reads. Options with a picture are left out.
            question = _MARK.sub("", _MARK.sub(task.IMAGE_MARK, question, count=1))
            background = _MARK.sub(r"(image)[\1]", background)
            pictured = any(_MARK.search(text) for text in row["options"])
            options = [] if pictured else paper_options(row["options"])
        hint = _HINTS[language].format(subject=subject)
        lines = (f"{hint}\n", background, question, "\n".join(options), _ANSWER_CUES[language])
        text = "\n".join(lines)
        if profile == "paper":
            return task.Prompt(text, document.images)
        return place_images(text, document)

    def score(self, document: task.Document, response: str, subset, profile, reply=None):
        row = document.row
        if profile == "paper":
            options, gold = paper_options(row["options"]), paper_answer(row["answer"])
        else:
            options = [text.partition(" ")[2] for text in _options(row["options"])]
            gold = _gold(row["answer"])
        return score_letter(self, document, response, subset, profile, options=options, gold=gold)


def numbered_pictures(row, numbers) -> list:
    """The pictures in the fields `image_1` and so on of a hub's row, up to the first empty one."""
    pictures = (row.get(f"image_{number}") for number in numbers)
    return list(itertools.takewhile(lambda picture: picture not in (None, "None", ""), pictures))


def place_images(text: str, document: task.Document) -> task.Prompt:
    """Replaces marks such as `<image 2>` by `<image>` and sorts the pictures as the marks name them.

    Without marks the prompt has all pictures.
    """
    named = [int(number) for number in _MARK.findall(text)]
    if unknown := [number for number in named if not 1 <= number <= len(document.images)]:
        raise ValueError(
            f"{document.id}: the text names <image {unknown[0]}>, but the row has {len(document.images)} pictures"
        )
    images = [document.images[number - 1] for number in named]
    return task.Prompt(_MARK.sub(task.IMAGE_MARK, text), tuple(images) or document.images)


def paper_options(options: list[str]) -> list[str]:
    """The options with the labels of the paper's harness (neulab/Pangea, m3exam/utils.py).

    It cuts off all that looks like a label, so "2 apples" and "3 apples" both become "apples".
    """
    bare = [re.sub(r"^[\(（]?[A-Da-d\d][\)）\.\s]+", "", text).strip() for text in options]
    return [f"({key}) {text}" for key, text in zip(LETTERS, bare)]


def paper_answer(answer: str) -> str:
    """The gold letter of the paper's harness: a first digit, also after a bracket, becomes the letter of that number.
    Other answers stay as they are."""
    match = re.match(r"\(?(\d)", answer)
    return chr(ord("A") + int(match.group(1)) - 1) if match else answer


def _options(options: list[str]) -> list[str]:
    """The options with the labels A, B, ...; their own labels are cut off only if all have one, in order."""
    labels = [_LABEL.match(text) for text in options]
    found = [match.group(1).upper() if match else "" for match in labels]
    size = len(options)
    if found in ([*LETTERS[:size]], [str(i + 1) for i in range(size)]):
        options = [text[match.end() :] for text, match in zip(options, labels)]
    return [f"({key}) {text}" for key, text in zip(LETTERS, options)]


def _gold(answer: str) -> str:
    bare = answer.strip().strip("()（）.．").upper()
    return (
        LETTERS[int(bare) - 1]
        if bare.isdecimal() and len(bare) < 3 and 0 < int(bare) <= len(LETTERS)
        else bare
    )


DATASET = M3Exam()
