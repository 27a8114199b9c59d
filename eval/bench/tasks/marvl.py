"""MaRVL and, for English, NLVR2: is a statement about two photographs true? (neulab/PangeaBench-marvl)

One picture shows both photographs side by side. The prompt is English for every language.
"""

import re
from types import MappingProxyType

from eval.bench import task
from eval.bench.reading.truth import truth

_SIZES = {"en": None, "id": 1128, "sw": 1108, "ta": 1242, "tr": 1180, "zh": 1012}
_HUB_PROMPT = re.compile(
    r"^(?:<image>\s*)?(?:Does the content of the image support the given text\? Text: )?(.*?)"
    r"(?:\s*Options: \(a\) false \(b\) true.*)?$",
    re.DOTALL,
)


class Marvl(task.Dataset):
    name, title, group = "marvl", "MaRVL", "multimodal"
    hub = "neulab/PangeaBench-marvl"
    version = 2
    changes = MappingProxyType({2: "truth values are read with their negations in every language"})
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
            read = truth(task.answer_text(response), subset.language)
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


DATASET = Marvl()
