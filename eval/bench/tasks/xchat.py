"""xChatBench: 50 open questions on pictures in eight languages, graded 1 to 5 by a judge (neulab/PangeaBench-xchat).

The judge (in the paper gpt-4o-2024-08-06, with the absolute grading of prometheus-eval) sees the question, a reference
answer and a rubric, but no picture. An answer that is not in the question's language scores 0. The paper's tables leave
out Kinyarwanda.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from eval.bench import task
from eval.bench.metrics import language_rule

_JUDGE_SYSTEM = (
    "You are a fair judge assistant tasked with providing clear, objective feedback based on specific criteria, "
    "ensuring each assessment reflects the absolute standards set for performance."
)
_JUDGE_USER = """###Task Description:
An instruction (might include an Input inside it), a response to evaluate, a reference answer that gets a score of 5, \
and a score rubric representing a evaluation criteria are given.
1. Write a detailed feedback that assess the quality of the response strictly based on the given score rubric, not \
evaluating in general.
2. After writing a feedback, write a score that is an integer between 1 and 5. You should refer to the score rubric.
3. The output format should look as follows: "(write a feedback for criteria) [RESULT] (an integer number between 1 \
and 5)"
4. Please do not generate any other opening, closing, and explanations.

###The instruction to evaluate:
{instruction}

###Response to evaluate:
{response}

###Reference Answer (Score 5):
{reference}

###Score Rubrics:
{rubric}

###Feedback: """
_SCORE_AT_END = re.compile(
    r"(?:\[(?:RESULT|SCORE)\]|\b(?:score|result)(?:\s+of)?)[\s:*]{0,9}[\[(]?\s{0,9}([1-5])\s{0,9}[\])]?"
    r"(?:/\s{0,9}5|out\s{1,9}of\s{1,9}5)?[\s.*]*$",
    re.IGNORECASE,
)
_LAST_LINE = re.compile(r"\n[ *]{0,9}([1-5])[ *]{0,9}\s*$")  # a score with no word before it
# prometheus-eval 0.1.18 and 0.1.19 read the first of these, wherever it stands; 0.1.20 only one that ends the reply.
_FIRST_SCORE = re.compile(
    r"(?:\[(?:RESULT|SCORE)\]|(?:\[RESULT\]|score|result):?|score\s+of)[\s(\[]*"
    r"(\d+)(?:[\s)\]]|$|/\s*5|out\s*of\s*5)",
    re.IGNORECASE,
)
RUBRIC_FIELDS = ("criteria", *(f"score{i}_description" for i in range(1, 6)))


class XChat(task.Dataset):
    name, title, group = "xchat", "xChatBench", "multimodal"
    hub = "neulab/PangeaBench-xchat"
    version = 2
    metric = "points"
    judged = True
    subsets = (
        *task.language_subsets(dict.fromkeys(("en", "es", "hi", "id", "ja", "ko", "zh"), 50)),
        task.Subset("rw", "rw", "none", 50),
    )
    fields = task.schema(
        system_prompt=str, input=str, reference_answer=str, rubric=dict, images=list
    )
    gold = "reference_answer"
    generation = task.Generation(max_new_tokens=1024)
    structural_zeros = MappingProxyType(
        {"rw": "langdetect does not know Kinyarwanda, so the paper's rule rejects every answer"}
    )

    def from_hub(self, row, subset, index):
        names = ("system_prompt", "input", "reference_answer")
        return {
            "id": f"{row['task']}/{row['instance_idx']}",
            **{name: row[name] for name in names},
            "rubric": dict(row["score_rubric"]),
            "images": [row["image"]],
        }

    def problem(self, row):
        missing = [name for name in RUBRIC_FIELDS if name not in row["rubric"]]
        return f"the rubric has no {missing[0]!r}" if missing else None

    def prompt(self, document, subset, profile):
        # The system prompt is English in every language and part of the user's message.
        return task.Prompt(
            f"{document.row['system_prompt']}\n\n{document.row['input']}", document.images
        )

    def judge_request(self, document, response):
        row = document.row
        return grading(row["input"], response, row["reference_answer"], row["rubric"])

    def readable(self, reply):
        return read_grade(reply) is not None

    def score(self, document: task.Document, response: str, subset, profile, reply=None):
        if reply is None:
            return task.Failed("the judge gave no reply")
        grade = paper_grade(reply) if profile == "paper" else read_grade(reply)
        if grade is None:
            return task.Failed(f"no score at the end of the judge's reply {reply[-60:]!r}")
        in_language = (
            language_rule.is_langdetect_language(response, subset.language)
            if profile == "paper"
            else language_rule.is_language(task.answer_text(response), subset.language)
        )
        points = (grade - 1) / 4
        return self.mean_score(
            grade,
            grade=grade,
            right_language=in_language,
            raw_points=points,
            points=points if in_language else 0,
        )


def grading(
    instruction: str, response: str, reference: str, rubric: Mapping[str, str]
) -> task.JudgeRequest:
    """The question to a judge for a grade of 1 to 5; `rubric` has the fields `RUBRIC_FIELDS`."""
    text = f"[{rubric['criteria']}]"
    for i in range(1, 6):
        text += f"\nScore {i}: {rubric[f'score{i}_description']}"
    user = _JUDGE_USER.format(
        instruction=instruction, response=response, reference=reference, rubric=text
    )
    return task.JudgeRequest(
        _JUDGE_SYSTEM, user, {"temperature": 1.0, "top_p": 0.9, "max_tokens": 1024}
    )


def read_grade(reply: str) -> int | None:
    """The 1 to 5 that ends a judge's reply, after `[RESULT]`, `Score:`, `score of` or the like, or on its last line."""
    match = _SCORE_AT_END.search(reply) or _LAST_LINE.search(reply)
    return int(match.group(1)) if match else None


def paper_grade(reply: str) -> int | None:
    """The grade that the published judgements record.

    It is the first score in the reply, as in prometheus-eval 0.1.19: in "not enough for a score of 3 or higher.
    [RESULT] 1" it is 3. This holds for 1 to 4. A 5 inside the feedback ("to reach a score of 5 it should") never became
    a published grade, so there the end of the reply decides. The published grade is 1 where a model gave no response.
    """
    if reply.strip() == "No Feedback":
        return 1
    match = _FIRST_SCORE.search(reply)
    first = int(match.group(1)) if match and len(match.group(1)) < 9 else None
    if first in (1, 2, 3, 4):
        return first
    return read_grade(reply) or (5 if first == 5 else None)


DATASET = XChat()
