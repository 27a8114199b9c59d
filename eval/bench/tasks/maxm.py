"""MaXM: short answers to questions on pictures in seven languages (neulab/PangeaBench-maxm).

To judge by the numbers, the paper's "accuracy" is relaxed accuracy.
"""

import re
from types import MappingProxyType

from eval.bench import task
from eval.bench.metrics import captions
from eval.bench.reading.short import same_value, short
from pangea_jax import languages

_SIZES = {"en": 257, "fr": 264, "hi": 260, "he": 280, "ro": 284, "th": 268, "zh": 277}
_DIGIT_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {word: str(i) for i, word in enumerate(_DIGIT_WORDS.split())} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
# The VQA evaluation script removes these marks if they touch a space, or if the text has a comma between digits. It
# replaces the others by a space.
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
    "there're there's they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's "
    "where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}


class Maxm(task.Dataset):
    name, title, group = "maxm", "MaXM", "multimodal"
    hub = "neulab/PangeaBench-maxm"
    version = 3
    changes = MappingProxyType({3: "the phrase that answers is read; digits of every script"})
    metric = "relaxed_accuracy"
    subsets = task.language_subsets(_SIZES)
    fields = task.schema(question=str, answers=list, images=list)
    gold = "answers"
    generation = task.Generation(max_new_tokens=64)

    def source(self, subset):
        return task.Source(self.hub, None, "iw" if subset.name == "he" else subset.name)

    def from_hub(self, row, subset, index):
        return {
            "id": str(row.get("question_id", index)),
            "question": row["question"],
            "answers": list(row["answers"]),
            "images": [row["image"]],
        }

    def prompt(self, document, subset, profile):
        language = languages.get(subset.language).english_name
        return task.Prompt(
            "Given the image and the question, provide a concise answer. "
            f"{document.row['question'].strip()}\n"
            f"Answer the question using a single word or phrase in {language}.",
            document.images,
        )

    def score(self, document, response, subset, profile, reply=None):
        golds = document.row["answers"]
        if profile == "paper":
            relaxed = paper_relaxed(response, golds)
            return self.mean_score(
                response, exact_match=response in golds, relaxed_accuracy=relaxed
            )
        text, code = task.answer_text(response), subset.language
        read = same_value(short(text, code), code)
        answer, *references = (captions.caption_tokens(t, code) for t in (text, *golds))
        return self.mean_score(
            read,
            exact_match=text in [gold.strip() for gold in golds],
            relaxed_accuracy=read in [same_value(gold, code) for gold in golds],
            rouge_l=captions.rouge_l(answer, references),
        )


def paper_relaxed(response: str, golds: list[str]) -> bool:
    """Relaxed accuracy of the paper's harness (neulab/Pangea, maxm/utils.py), with its faults.

    It cleans the response as the text of a Python list with one element. The quotes protect the first and the last word
    from the rules for articles and numbers, and the joiners of Hindi become escape sequences. It does not clean gold
    answers. A response is right if it begins or ends with a gold answer, and every text begins with an empty one.
    """
    cleaned = _vqa_clean(str([response.rstrip(".")]).removeprefix("[").removesuffix("]")).strip("'")
    golds = [
        {"true": "yes", "false": "no"}.get(str(g).strip().lower(), str(g).strip()) for g in golds
    ]
    return any(cleaned.startswith(gold) or cleaned.endswith(gold) for gold in golds)


def _vqa_clean(text: str) -> str:
    between_digits = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _VQA_PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_space or between_digits else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = [_NUMBER_WORDS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


DATASET = Maxm()
