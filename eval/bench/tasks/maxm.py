"""MaXM: short answers to questions on pictures in seven languages (neulab/PangeaBench-maxm).

The printed "accuracy" is relaxed accuracy, as far as the numbers tell.
"""

import re

from eval.bench import task
from eval.bench.metrics import captions, squad
from pangea_jax import languages

_SIZES = {"en": 257, "fr": 264, "hi": 260, "he": 280, "ro": 284, "th": 268, "zh": 277}
_DIGIT_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {word: str(i) for i, word in enumerate(_DIGIT_WORDS.split())} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
# The punctuation of the VQA evaluation script: removed where it touches a space or a comma stands between digits,
# else replaced by a space.
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
    version = 2
    metric = "relaxed_accuracy"
    subsets = task.language_subsets(_SIZES)
    fields = task.schema(question=str, answers=list, images=list)
    gold = "answers"
    generation = task.Generation(max_new_tokens=64)

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
            metrics = {
                "exact_match": float(response in golds),
                "relaxed_accuracy": float(paper_relaxed(response, golds)),
            }
            return task.mean_of(metrics, "relaxed_accuracy", response)
        text = task.answer_text(response)
        read = _plain(text, subset.language)
        plain = [_plain(gold, subset.language) for gold in golds]
        tokens = [captions.caption_tokens(gold, subset.language) for gold in golds]
        metrics = {
            "exact_match": float(text in [gold.strip() for gold in golds]),
            "relaxed_accuracy": float(read in plain),
            "rouge_l": captions.rouge_l(captions.caption_tokens(text, subset.language), tokens),
        }
        return task.mean_of(metrics, "relaxed_accuracy", read)


def _plain(text: str, language: str) -> str:
    """Without case, punctuation, English articles; numbers as digits; true and false as yes and no."""
    text = squad.normalize(text, unicode_punctuation=True, articles=language == "en")
    words = [_NUMBER_WORDS.get(word, word) for word in text.split()]
    return " ".join({"true": "yes", "false": "no"}.get(word, word) for word in words)


def paper_relaxed(response: str, golds: list[str]) -> bool:
    """Relaxed accuracy of the paper's harness (neulab/Pangea, maxm/utils.py), with its quirks.

    The response is cleaned as the text of a one-element Python list, so that the quotes guard its first and last word
    from the article and number rules and joiners of Hindi are spelled out as escapes; gold answers are not cleaned at
    all; beginning or ending with the gold is enough, and everything begins with an empty gold.
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
