"""M-LlavaBench: 60 open questions on 24 pictures in ten languages, compared with GPT-4's answer by a judge.

neulab/PangeaBench-multilingual-llava-bench. The judge (gpt-4-0613 in the paper's harness) rates both answers 1 to 10,
from captions of the picture. The score is the ratio of the means in percent; it can exceed 100.
"""

import math
import re

import numpy as np

from eval.bench import task
from eval.bench.metrics import language_rule

_JUDGE_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_RULE = """We would like to request your feedback on the performance of two AI assistants in response to the user \
question displayed above. The user asks the question on observing an image. For your reference, the visual content in \
the image is represented with a few sentences describing the image. 
Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an \
overall score on a scale of 1 to 10, where a higher score indicates better overall performance.
Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, \
respectively. The two scores are separated by a space.
In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias and \
ensuring that the order in which the responses were presented does not affect your judgment."""
_LANGUAGES = ("en", "ar", "bn", "es", "fr", "hi", "ja", "ru", "ur", "zh")
_TWO_SCORES = re.compile(r"\D*?(\d+(?:\.\d+)?)(?:\s*/\s*10)?\D+?(\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*")


class MLlavaBench(task.Dataset):
    name, title, group = "m_llavabench", "M-LlavaBench", "multimodal"
    hub = "neulab/PangeaBench-multilingual-llava-bench"
    version = 2
    metric = "ratio"
    judged = True
    bounded = False  # a ratio to another model's points
    paper_scores_failures = True
    subsets = task.language_subsets(dict.fromkeys(_LANGUAGES, 60))
    fields = task.schema(question=str, caption=str, gpt_answer=str, category=str, images=list)
    gold = "gpt_answer"
    generation = task.Generation(max_new_tokens=1024)

    def from_hub(self, row, subset, index):
        caption = row["caption"]
        return {
            "id": str(row["question_id"]),
            "question": row["question"] if "question" in row else row["text"],
            "caption": caption if isinstance(caption, str) else "\n".join(caption),
            "gpt_answer": row["gpt_answer"],
            "category": row["category"],
            "images": [row["image"]],
        }

    def prompt(self, document, subset, profile):
        return task.Prompt(document.row["question"], document.images)

    def judge_request(self, document, response):
        row = document.row
        user = (
            f"[Context]\n{row['caption']}\n\n[Question]\n{row['question']}\n\n"
            f"[Assistant 1]\n{row['gpt_answer']}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{response}\n\n[End of Assistant 2]\n\n[System]\n{_RULE}\n\n"
        )
        return task.JudgeRequest(_JUDGE_SYSTEM, user, {"temperature": 0.2, "max_tokens": 1024})

    def readable(self, reply):
        return read_scores(reply) is not None

    def score(self, document: task.Document, response: str, subset, profile, reply=None):
        if profile == "paper":
            reference, ours = _paper_scores(document, response, reply)
            in_language = ours != 0
        else:
            if reply is None:
                return task.Failed("the judge gave no reply")
            scores = read_scores(reply)
            if scores is None:
                return task.Failed(
                    f"the judge's reply does not begin with two scores: {reply[:60]!r}"
                )
            in_language = language_rule.is_language(task.answer_text(response), subset.language)
            reference, ours = scores[0], scores[1] if in_language else 0.0
        metrics = {"reference": reference, "answer": ours, "right_language": float(in_language)}
        return task.Scored([reference, ours], metrics, (reference, ours, 1.0))

    def combine(self, sums, profile):
        with np.errstate(invalid="ignore", divide="ignore"):
            if profile == "fixed":
                return 100 * sums[..., 1] / sums[..., 0]
            means = np.round(sums[..., :2] / sums[..., 2:], 3)
            return np.round(100 * means[..., 1] / means[..., 0], 1)


def read_scores(reply: str) -> tuple[float, float] | None:
    """The two ratings on the first line of a reply, with any separator; each must lie between 1 and 10."""
    first = reply.strip().partition("\n")[0]
    match = _TWO_SCORES.fullmatch(first)
    scores = (float(match.group(1)), float(match.group(2))) if match else None
    return scores if scores and all(1 <= score <= 10 for score in scores) else None


def paper_scores(reply: str) -> tuple[float, float]:
    """The parser of the paper's harness: the first line is two numbers with one space between, else both are -1."""
    parts = reply.strip().partition("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return -1.0, -1.0
    # One "nan" or "inf" would otherwise be the score of the whole subset.
    return (first, second) if math.isfinite(first + second) else (-1.0, -1.0)


def _paper_scores(document, response, reply) -> tuple[float, float]:
    """The scores of an item in neulab/Pangea, utils.py. A failed item adds -1 to both means, a ratio of 100 %.

    The language rule: an answer scores 0 if langdetect labels neither the reference nor the question as it labels the
    answer. Chinese in other characters scores 0 too. If langdetect finds no language, the whole item fails.
    """
    if reply is None:
        return -1.0, -1.0
    reference, ours = paper_scores(reply)
    try:
        label = language_rule.langdetect_label(response)
        expected = {
            language_rule.langdetect_label(document.row[name])
            for name in ("gpt_answer", "question")
        }
    except language_rule.NoLanguageError:
        return -1.0, -1.0
    return reference, ours if label in expected else min(0.0, ours)


DATASET = MLlavaBench()
