"""Records in the common forms as records of PangeaIns."""

import ast
import base64
import json
import sqlite3
from pathlib import Path

import pytest

from pangea_jax.data.build import embedded, rejections
from pangea_jax.data.build.own_records import Rules, as_pangeains
from pangea_jax.data.record import Conversation, RecordError
from tests.data.build.released import encoded, noise

ROOT = Path(__file__).parents[3]


def read(raw, **rules):
    return as_pangeains(raw, Rules(**rules), "data:1")


def texts(raw, **rules):
    return [turn["value"] for turn in read(raw, **rules).record["conversations"]]


def said(*values, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * len(values)
    return turns + [{"role": r, "content": v} for r, v in zip(roles, values, strict=False)]


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


@pytest.mark.parametrize(
    "record",
    [
        {"id": 2433684022797.0, "image": "./a//1.jpg", "conversations": TURNS, "language": "iw"},
        {"id": "x", "conversations": [{"from": "gpt", "value": "Hi"}, *TURNS], "image": ["b.jpg"]},
        {"id": "x", "image": "/d/b.jpg", "conversations": TURNS, "source": "s", "category": "c"},
        {"id": "x", "image": "", "conversations": TURNS[1:]},
        {"id": "x", "image": ["a", "b"], "conversations": TURNS, "language": "tlh"},
    ],
)
def test_a_record_of_pangeains_does_not_change(record):
    def outcome(raw):
        try:
            return Conversation.from_pangeains(raw, default_language="en")
        except RecordError as error:
            return str(error)

    assert outcome(read(record).record) == outcome(record)


@pytest.mark.parametrize(
    ("content", "images", "text", "placed"),
    [
        ("<image> or <image>?", ["a", "b"], "<image> or <image>?", ["a", "b"]),
        ("Which?", ["a", "b"], "<image> <image>\nWhich?", ["a", "b"]),
        ([{"type": "text", "text": "Which?"}], ["a"], "<image>\nWhich?", ["a"]),
        ([{"type": "text", "text": "<image>\nWhich?"}], ["a"], "<image>\nWhich?", ["a"]),
        (
            [{"type": "image", "image": "c"}, {"text": "<image>?"}],
            [],
            "<image>\n<image\u200b>?",
            ["c"],
        ),
        ([{"text": "?"}, {"type": "image", "image": None}], ["a"], "?\n<image>", ["a"]),
        ([{"type": "image_url", "image_url": {"url": "c"}}, "?"], [], "<image>\n?", ["c"]),
        ([{"type": "image", "path": "c"}, {"text": "?"}], ["c"], "<image>\n?", ["c"]),
    ],
)
def test_pictures_keep_their_places(content, images, text, placed):
    made = read({"messages": said(content, "x"), "images": images}).record
    assert (made["conversations"][0]["value"], made["image"]) == (text, placed)
    found = Conversation.from_pangeains(made, default_language="en")
    assert found.images == tuple(placed)


@pytest.mark.parametrize("marked", ["<ima<image>ge>?", "What is <image>?", "a <image> b <image>"])
def test_a_mark_in_an_answer_or_without_a_picture_is_no_picture(marked):
    for raw in (
        {"messages": said(marked, "x")},
        {"messages": said("?", marked), "images": ["a"]},
        {"messages": said("?", "x", system=marked), "images": ["a"]},
        {"question": "?", "answer": marked, "image": "a"},
    ):
        with pytest.raises(RecordError, match="marker"):
            Conversation.from_pangeains(read(raw).record, default_language="en")


def test_a_picture_that_is_named_twice_needs_two_marks():
    raw = {"messages": said("<image>?", "x"), "images": ["a", "a"]}
    with pytest.raises(RecordError, match=r"1 <image> in the turns, 2 in `image`"):
        Conversation.from_pangeains(read(raw).record, default_language="en")


def test_names_can_be_given():
    raw = {"q": "What?", "a": "A cat.", "question": "no", "path": "x.png"}
    columns = {"question": "q", "answer": "a", "image": "path"}
    made = read(raw, columns=columns)
    assert made.record["image"] == ["x.png"]
    assert [t["value"] for t in made.record["conversations"]] == ["<image>\nWhat?", "A cat."]
    assert made.notes == ["field question is not used"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"instruction": "Add.", "input": "2 and 2", "output": 4}, ["Add.\n2 and 2", "4"]),
        ({"instruction": "Add.", "input": "", "output": "4"}, ["Add.", "4"]),
        ({"prompt": "P", "response": "R"}, ["P", "R"]),
        ({"conversations": json.dumps(TURNS), "image": '["a"]'}, ["<image>\nWhat?", "A cat."]),
        (
            {"conversations": {"from": ["human", "gpt"], "value": ["A?", "B."]}},
            ["A?", "B."],
        ),
        ({"messages": [], "question": "A?", "answer": "B."}, ["A?", "B."]),
        ({"messages": said("A?", "B."), "system": "S"}, ["S", "A?", "B."]),
        ({"messages": said("A?", "B.", system="T")}, ["T", "A?", "B."]),
    ],
)
def test_forms_of_a_conversation(raw, expected):
    assert texts(raw) == expected
    assert read(raw).notes == []


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"question": "How many?", "answer": float("nan")}, "field answer: wrong type .*found nan"),
        ({"question": "How many?", "answer": True}, "field answer: wrong type .*found True"),
        ({"messages": said("How many?", 3)}, r"messages\[1\].content: wrong type .*found 3"),
        (
            {"messages": said("?", "x"), "images": ["a", ""]},
            r"images: wrong type .*found \['a', ''\]",
        ),
    ],
)
def test_odd_values_are_named(raw, said):
    with pytest.raises(RecordError, match=said):
        read(raw)


def test_two_system_prompts_are_not_lost_silently():
    made = read({"messages": said("A?", "B.", system="T"), "system": "S"})
    assert made.record["conversations"][0]["value"] == "T"
    assert made.notes == ["field system is not used"]


@pytest.mark.parametrize(
    ("raw", "ours", "theirs"),
    [
        ({"prompt": "A?", "output": " "}, "conversations[1].value", "output"),
        ({"messages": said("A?", " ")}, "conversations[1].value", "messages[1].content"),
        ({"messages": said("A?"), "system": "S"}, "conversations[1].from", "messages[0].role"),
        ({"messages": said("A?", "B."), "lang": "x"}, "language", "lang"),
        ({"images": ["a"], "question": "A?", "answer": "B"}, "image", "images"),
    ],
)
def test_faults_are_named_as_the_fields_are_called(raw, ours, theirs):
    assert read(raw).name(ours) == theirs


def test_pictures_in_records_are_taken_out_and_kept_once(tmp_path):
    data = encoded(noise(20, 20), "PNG")
    text = base64.b64encode(data).decode()
    raw = {
        "a": data,
        "b": {"bytes": data, "path": "x.png"},
        "c": [f"data:image/png;base64,{text}"],
        "d": text,
        "e": {"bytes": None, "path": "x.png"},
        "f": "/9j/a.png",
        "g": f"data:image/png;base64,{text}?",
    }
    writer = embedded.Writer(tmp_path / "w/pictures.sqlite")
    taken = writer.take(raw)
    writer.close()
    json.dumps(taken)
    digest, size = embedded.reference_of(taken["a"])
    assert size == len(data)
    assert taken["a"] == taken["b"] == taken["c"][0] == taken["d"]
    assert [taken[name] for name in "efg"] == [raw[name] for name in "efg"]
    assert embedded.read(tmp_path / "w/pictures.sqlite", digest) == data
    with sqlite3.connect(tmp_path / "w/pictures.sqlite") as database:
        assert database.execute("SELECT count(*) FROM pictures").fetchone() == (1,)
    with pytest.raises(OSError, match=r"pictures\.sqlite has no picture x"):
        embedded.read(tmp_path / "w/pictures.sqlite", "x")


def reasons():
    """The first argument of every RecordError, and every fault of a picture."""
    data = ROOT / "pangea_jax/data"
    for path in (data / "record.py", data / "image.py", *(data / "build").glob("*.py")):
        calls = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for call in (node for node in calls if isinstance(node, ast.Call)):
            called = ast.unparse(call.func).rpartition(".")[2]
            place = {"RecordError": 0, "_error": 0, "ImageError": 2}.get(called, 9)
            if place < len(call.args) and isinstance(call.args[place], ast.Constant):
                yield call.args[place].value


def test_every_fault_has_a_remedy():
    found = set(reasons())
    assert len(found) > 20
    assert found - rejections._REMEDIES.keys() == set()
