"""MaRVL and, for English, NLVR2: is a statement on two photographs true (neulab/PangeaBench-marvl).

The photographs are one picture, side by side. The prompt stays English in every language.
"""

import re
import unicodedata

from eval.bench import task

_SIZES = {"en": None, "id": 1128, "sw": 1108, "ta": 1242, "tr": 1180, "zh": 1012}
_TRUE = {
    "true", "yes", "b",
    "benar", "ya", "betul", "kweli", "ndiyo", "உண்மை", "ஆம்", "doğru", "evet", "是", "是的", "对", "真", "正确",
}  # fmt: skip
_FALSE = {
    "false", "no", "a",
    "salah", "tidak", "uongo", "hapana", "si kweli", "பொய்", "தவறு", "இல்லை", "yanlış", "hayır", "否", "不是", "不",
    "不对", "假", "错误", "错",
}  # fmt: skip


class Marvl(task.Dataset):
    name, title, group = "marvl", "MaRVL", "multimodal"
    hub = "neulab/PangeaBench-marvl"
    about = 11_040
    subsets = task.language_subsets(_SIZES)
    fields = task.schema(hypothesis=str, answer=bool, images=list)
    generation = task.Generation(max_new_tokens=16)

    def prompt(self, document, subset, profile):
        return task.Prompt(
            "Does the content of the image support the given text? "
            f"Text: {document.row['hypothesis']}\n"
            "Options: (a) false (b) true. Answer with the option directly.",
            document.images,
        )

    def score(self, document, response, subset, profile, reply=None):
        gold = "true" if document.row["answer"] else "false"
        read = (
            paper_reading(response) if profile == "paper" else reading(task.answer_text(response))
        )
        right = gold in read if profile == "paper" else read == gold
        metrics = {"acc": float(right), "unreadable": float(read not in ("true", "false"))}
        return task.mean_of(metrics, "acc", read)


def paper_reading(response: str) -> str:
    """What the paper's harness compares with (neulab/Pangea, marvl/utils.py).

    "no" anywhere in the response, in "know" and "none" too, is false; "true or false" holds both answers and is
    right for either label; a bare "(b)" is neither.
    """
    text = response.lower().strip()
    if "yes" in text:
        return "true"
    return "false" if "no" in text else text


def reading(response: str) -> str | None:
    """`true`, `false` or None: an option letter or truth word, of English or of the statement's language.

    "not true" is false; a response that holds both words is neither.
    """
    text = unicodedata.normalize("NFKC", response).casefold().strip()
    bare = text.strip(" .!。、,()[]\"'*:")
    if bare in _TRUE or bare in _FALSE:
        return "true" if bare in _TRUE else "false"
    if lettered := set(re.findall(r"\(([ab])\)", text)) or set(re.findall(r"^([ab])[).:\s]", text)):
        return {"a": "false", "b": "true"}[lettered.pop()] if len(lettered) == 1 else None
    text = re.sub(
        r"\b(?:not|isn['’]t) (true|false)\b", lambda m: "false" if m[1] == "true" else "true", text
    )
    words = set(re.findall(r"\w+", text)) - {"a", "b"}
    is_true, is_false = bool(words & _TRUE), bool(words & _FALSE)
    return None if is_true == is_false else "true" if is_true else "false"


DATASET = Marvl()
