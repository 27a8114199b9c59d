"""MaRVL and, for English, NLVR2: is a statement about two photographs true? (neulab/PangeaBench-marvl)

One picture shows both photographs side by side. The prompt is English for every language.
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


_HUB_PROMPT = re.compile(
    r"^(?:<image>\s*)?(?:Does the content of the image support the given text\? Text: )?(.*?)"
    r"(?:\s*Options: \(a\) false \(b\) true.*)?$",
    re.DOTALL,
)


class Marvl(task.Dataset):
    name, title, group = "marvl", "MaRVL", "multimodal"
    hub = "neulab/PangeaBench-marvl"
    about = 11_040
    subsets = task.language_subsets(_SIZES)
    fields = task.schema(hypothesis=str, answer=bool, images=list)
    generation = task.Generation(max_new_tokens=16)

    def from_hub(self, row, subset, index):
        if "hypothesis" in row:
            hypothesis, label = row["hypothesis"], row["label"]
            picture = row.get("horizontally_stacked_img", row.get("image"))
        else:
            question, label = (turn["value"] for turn in row["conversations"][:2])
            hypothesis, picture = _HUB_PROMPT.match(question).group(1), row["image"]
        return {
            "id": str(row.get("id", index)),
            "hypothesis": hypothesis.strip(),
            "answer": str(label).strip().lower() in ("true", "1", "yes"),
            "images": [picture],
        }

    def prompt(self, document, subset, profile):
        return task.Prompt(
            "Does the content of the image support the given text? "
            f"Text: {document.row['hypothesis']}\n"
            "Options: (a) false (b) true. Answer with the option directly.",
            document.images,
        )

    def score(self, document, response, subset, profile, reply=None):
        gold = "true" if document.row["answer"] else "false"
        if profile == "paper":
            read = paper_reading(response)
            right = gold in read
        else:
            read = reading(task.answer_text(response))
            right = read == gold
        return self.mean_score(read, acc=right, unreadable=read not in ("true", "false"))


def paper_reading(response: str) -> str:
    """The text that the paper's harness compares with the label (neulab/Pangea, marvl/utils.py).

    "no" anywhere in the response means false, also in "know" and "none". "true or false" contains both answers, so it
    is right for both labels. "(b)" alone is neither.
    """
    text = response.lower().strip()
    if "yes" in text:
        return "true"
    return "false" if "no" in text else text


def reading(response: str) -> str | None:
    """`true`, `false` or None, from an option letter or a word for true or false in any of the languages.

    "not true" is false. A response with both words is neither.
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
