import json
import pickle
from pathlib import Path

import pytest

from pangea_jax.data.record import Conversation, RecordError, Turn

SAMPLE = Path(__file__).parents[2].parent / "shared/data/pangeains_sample/PangeaIns.json"


def pangeains_record(**changes):
    record = {
        "id": "7",
        "image": "cultural/7.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\n这是什么？"},
            {"from": "gpt", "value": "猫"},
            {"from": "human", "value": "颜色？"},
            {"from": "gpt", "value": "黑色"},
        ],
        "language": "zh",
    }
    return record | changes


def said(*values):
    speakers = ("human", "gpt") * len(values)
    return [{"from": s, "value": v} for s, v in zip(speakers, values, strict=False)]


def test_parses_pangeains():
    conversation = Conversation.from_pangeains(pangeains_record())
    assert conversation == Conversation(
        id="7",
        source="cultural",
        language="zh",
        category="",
        images=("cultural/7.jpg",),
        turns=(
            Turn("user", "<image>\n这是什么？"),
            Turn("assistant", "猫"),
            Turn("user", "颜色？"),
            Turn("assistant", "黑色"),
        ),
    )
    assert conversation.kind == "image"


@pytest.mark.parametrize(
    "record",
    [
        pangeains_record(),
        pangeains_record(language="iw"),
        pangeains_record(image=["a/1.jpg", "a/2.jpg"], conversations=said("<image><image>?", "x")),
        {"id": "t", "conversations": said("2+2?", "4"), "language": "sw"},
    ],
    ids=["turns", "hebrew", "two images", "text"],
)
def test_round_trip(record):
    conversation = Conversation.from_pangeains(record)
    written = conversation.to_pangeains()
    assert record.items() <= written.items()
    assert Conversation.from_pangeains(written) == conversation


def test_hebrew_becomes_he():
    assert Conversation.from_pangeains(pangeains_record(language="iw")).language == "he"


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"language": "xx"}, "unknown language", "language"),
        ({"image": None}, "markers and images differ in number", "image"),
        ({"image": ["a", "b"]}, "markers and images differ in number", "image"),
        ({"image": 3}, "wrong type", "image"),
        ({"conversations": []}, "no turns", "conversations"),
        ({"conversations": "hi"}, "wrong type", "conversations"),
        ({"conversations": ["hi"]}, "wrong type", "conversations[0]"),
        ({"conversations": said("<image>", " ")}, "empty answer", "conversations[1].value"),
        ({"conversations": said(" ", "x")}, "empty question", "conversations[0].value"),
        ({"conversations": said("a", "<image>")}, "marker in an answer", "conversations[1].value"),
        ({"conversations": said("<image>")}, "last turn is not an answer", "conversations[0].from"),
        (
            {"conversations": said("<image>", "x")[::-1]},
            "roles do not alternate",
            "conversations[0].from",
        ),
        (
            {"conversations": [{"from": "system", "value": "x"}]},
            "unknown speaker",
            "conversations[0].from",
        ),
        (
            {"conversations": [{"from": "human", "value": None}]},
            "wrong type",
            "conversations[0].value",
        ),
    ],
)
def test_faults_are_named(changes, reason, field):
    with pytest.raises(RecordError) as caught:
        Conversation.from_pangeains(pangeains_record(**changes))
    error = caught.value
    assert (error.reason, error.field, error.record_id) == (reason, field, "7")
    assert reason in str(error)
    assert field in str(error)
    assert "'7'" in str(error)


def test_record_without_language_needs_a_default():
    record = pangeains_record()
    del record["language"]
    with pytest.raises(RecordError, match="field language: field is missing"):
        Conversation.from_pangeains(record)
    assert Conversation.from_pangeains(record, default_language="en").language == "en"
    stated = Conversation.from_pangeains(pangeains_record(), default_language="en")
    assert stated.language == "zh"


def test_record_without_id_is_an_error():
    record = pangeains_record()
    del record["id"]
    with pytest.raises(RecordError, match="field id: field is missing"):
        Conversation.from_pangeains(record)


@pytest.mark.parametrize(
    ("image", "source"),
    [
        ("images/general/cambrian/a/1.jpg", "general/cambrian"),
        ("images/cultural/1.jpg", "cultural"),
        ("1.jpg", ""),
    ],
)
def test_source_is_the_data_set_of_the_image(image, source):
    record = pangeains_record(image=image)
    assert Conversation.from_pangeains(record).source == source
    assert Conversation.from_pangeains(record, source="mine").source == "mine"


def test_published_sample_of_pangeains():
    if not SAMPLE.is_file():
        pytest.skip(f"no PangeaIns sample at {SAMPLE}")
    records = json.loads(SAMPLE.read_text(encoding="utf-8"))
    for record in records:
        conversation = Conversation.from_pangeains(record, default_language="en")
        written = conversation.to_pangeains()
        assert written["conversations"] == record["conversations"]
        assert written.get("image") == record.get("image")


def test_error_survives_pickling():
    error = RecordError("empty answer", "conversations[1].value", "detail", "7")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
