"""Captions and pairs of instructions: what is read, repaired and refused; the prompts; what models are shown."""

import base64
import io
import json
import time

import pytest
from PIL import Image

from pangea_jax.curation import image_scores, instructions, prompts
from pangea_jax.curation.asking import Unusable

from .samples import ENGLISH, SENTENCES, picture


@pytest.mark.parametrize("code", SENTENCES)
def test_captions_are_kept_in_their_own_language_only(code):
    assert instructions.read_caption(f"  {SENTENCES[code]}\n", code) == SENTENCES[code]
    for other, text in SENTENCES.items():
        if other != code:
            with pytest.raises(Unusable, match="caption is in wrong language"):
                instructions.read_caption(text, code)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "caption is too short"),
        ("Una plaza.", "caption is too short"),
        (SENTENCES["es"] * 60, "caption is too long"),
        (SENTENCES["es"] * 30, "caption repeats itself"),
        (f"{SENTENCES['es']} <image>", "caption holds a marker"),
        (ENGLISH, "caption is in wrong language"),
    ],
)
def test_captions_that_cannot_be_used_say_why(answer, reason):
    with pytest.raises(Unusable) as caught:
        instructions.read_caption(answer, "es")
    assert caught.value.reason == reason


def pair(kind="Critical Reasoning", **changes):
    plain = {"instruction": SENTENCES["es"], "response": f"Bueno. {SENTENCES['es']}"}
    return {"task type": kind} | plain | changes


@pytest.mark.parametrize(
    ("found", "count", "faults"),
    [
        ([pair(), pair("Data Analysis")], 2, []),
        ({"pairs": [pair(), pair("data analysis")]}, 2, []),
        ([pair("Coding and Debugging"), pair("Creative Writing"), pair("Data Analysis")], 2, []),
        ([pair()], 1, ["there was only one pair"]),
        ([pair(), pair()], 1, ["both pairs are of one task type"]),
        ([pair(), pair("Chatting")], 1, ["task type is not among the 13"]),
        ([pair(), pair("Data Analysis", response=ENGLISH)], 1, ["response is in wrong language"]),
        (
            [pair(), pair("Data Analysis", response="<image> " + SENTENCES["es"])],
            1,
            ["response holds a marker"],
        ),
        (
            [pair(), pair("Data Analysis", response=SENTENCES["es"] * 40)],
            1,
            ["response repeats itself"],
        ),
        (
            [pair(), pair("Data Analysis", instruction="¿Qué dice el caption?" + SENTENCES["es"])],
            1,
            ["instruction speaks of a caption"],
        ),
        (
            [pair(), pair("Data Analysis", response=SENTENCES["es"])],
            1,
            ["response is the instruction"],
        ),
        ([pair(), pair("Data Analysis", response=None)], 1, ["a key is missing or not a text"]),
        (
            [pair(), pair("Data Analysis", response="\ud83d " + SENTENCES["es"])],
            1,
            ["response holds half a character"],
        ),
    ],
)
def test_pairs_are_checked_one_by_one(found, count, faults):
    answer = f"Here: ```json\n{json.dumps(found)}\n```"
    if count == 2:
        pairs, dropped = instructions.read_pairs(answer, "es")
    else:  # asked for once more, and kept if that is no better
        with pytest.raises(Unusable, match="only one pair") as caught:
            instructions.read_pairs(answer, "es")
        pairs, dropped = caught.value.rest
    assert len(pairs) == count and dropped == faults
    assert {p["task type"] for p in pairs} <= set(prompts.TASK_TYPES)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no JSON of pairs"),
        ("[" * 20_000, "no JSON of pairs"),
        ('{"instruction": ' * 1500, "no JSON of pairs"),
        (json.dumps([pair()])[:-20], "no JSON of pairs"),
        ("x" * 50_000, "answer is too long"),
        (json.dumps([pair("None of them")]), "task type is not among the 13"),
        ("__import__('os').system('true')", "no JSON of pairs"),
    ],
)
def test_answers_without_a_usable_pair_are_refused(answer, reason):
    with pytest.raises(Unusable) as caught:
        instructions.read_pairs(answer, "es")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "unit", ["*", "1", "1.", ": ", "[", '["', '{"a":', "[0,", "- 1) ", "<image>", "$"]
)
def test_no_answer_takes_long_to_read(unit):
    began = time.process_time()
    for length in (1_999, 9_999, 27_999):
        answer = (unit * length)[:length]
        for read in (image_scores.read_score, lambda a: instructions.read_pairs(a, "es")):
            with pytest.raises(Unusable):
                read(answer)
    instructions.text_fault((unit * 9_999)[:9_999], "es", 1, 10_000)
    assert time.process_time() - began < 3


def test_prompts_are_the_published_ones():
    assert len(set(prompts.RECAPTION)) == 5 and len(set(prompts.SUBJECTS)) == 11
    assert len(set(prompts.TASK_TYPES)) == 13
    # Appendix B's wording, at places where a slip would show.
    scoring = prompts.SCORING.format(text="T", subjects="; ".join(prompts.SUBJECTS))
    assert scoring.startswith(
        "You are given an [Alt Text] associated with an image from the web. [Alt Text]: T Your"
    )
    assert (
        "Choose from the following categories: Vehicles and Transportation; Cooking and Food; People"
        in scoring
    )
    assert scoring.endswith(
        "Only generate the final result without any additional descriptions or explanations."
    )
    for prompt in prompts.RECAPTION:
        filled = prompt.format(language="L", country="C", subject="S", text="{not a field}")
        assert (
            all(f'"{v}"' in filled or f" {v}" in filled for v in "LCS")
            and "{not a field}" in filled
        )


@pytest.mark.parametrize(
    ("kind", "size"),
    [("JPEG", (300, 200)), ("PNG", (300, 200)), ("BMP", (300, 200)), ("JPEG", (3000, 2000))],
)
def test_pictures_are_shown_as_they_are_or_smaller(kind, size):
    body = picture(1, size, kind)
    head, _, data = instructions.data_url(body, 1024).partition(",")
    shown = base64.b64decode(data)
    if kind != "BMP" and max(size) <= 1024:
        assert shown == body and head == f"data:image/{kind.lower()};base64"
    else:
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(shown)).size == ((300, 200) if kind == "BMP" else (1024, 683))
