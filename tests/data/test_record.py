import json
import pickle
from decimal import Decimal
from pathlib import Path

import pytest

from pangea_jax import language_id, languages
from pangea_jax.data.record import (
    Conversation,
    RecordError,
    Turn,
    identify_language,
    identify_or_und,
    image_paths,
)

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
        category="cultural",
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
        {
            "id": "t",
            "conversations": [{"from": "system", "value": "Sums."}, *said("2+2?", "4")],
            "language": "und",
        },
    ],
    ids=["turns", "hebrew", "two images", "text", "system"],
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
            {"conversations": said("<image>", "x", "y")[:1] + said("<image>", "x")},
            "roles do not alternate",
            "conversations[1].from",
        ),
        ({"conversations": said("x")[::-1] * 2}, "roles do not alternate", "conversations[1].from"),
        ({"image": "../7.jpg"}, "path is not allowed", "image"),
        ({"image": "a/../../7.jpg"}, "path is not allowed", "image"),
        ({"image": "/"}, "path is not allowed", "image"),
        ({"image": ["a.jpg", ""]}, "wrong type", "image"),
        (
            {"conversations": said("<image>", "\ud83d")},
            "not valid Unicode",
            "conversations[1].value",
        ),
        ({"source": "\ud83d"}, "not valid Unicode", "source"),
        ({"language": None}, "field is missing", "language"),
        ({"language": ""}, "field is missing", "language"),
        (
            {"conversations": [*said("<image>", "x"), {"from": "system", "value": "x"}]},
            "unknown speaker",
            "conversations[2].from",
        ),
        (
            {"conversations": [{"from": "system", "value": "<image>"}, *said("x", "y")]},
            "marker in the system prompt",
            "conversations[0].value",
        ),
        ({"conversations": [{"from": "system", "value": "x"}]}, "no turns", "conversations"),
        (
            {"conversations": [{"from": ["human"], "value": "x"}]},
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


@pytest.mark.parametrize(
    ("written", "id"),
    [
        ("r_1", "r_1"),
        (" r_1 ", "r_1"),
        (2433684022797.0, "2433684022797.0"),
        ("2433684022797.0", "2433684022797.0"),
        (1e16, "10000000000000000.0"),
        (0.5, "0.5"),
        (17, "17"),
        (10**400, "1" + "0" * 400),
        (0, "0"),
        (Decimal("2433684022797.0"), "2433684022797.0"),
    ],
)
def test_ids_are_those_of_the_release(written, id):
    assert Conversation.from_pangeains(pangeains_record(id=written)).id == id


@pytest.mark.parametrize("written", [True, float("nan"), float("inf"), ["r"], {}])
def test_missing_id_is_an_error(written):
    with pytest.raises(RecordError, match="field id: wrong type"):
        Conversation.from_pangeains(pangeains_record(id=written))


@pytest.mark.parametrize("record", [None, "text", 3, ["list"]])
def test_record_must_be_an_object(record):
    with pytest.raises(RecordError, match="field record: wrong type"):
        Conversation.from_pangeains(record)


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        ("iw", "he"),
        ("he", "he"),
        ("zh", "zh"),
        ("zh_simplified", "zh"),
        ("urdu", "ur"),
        ("ur", "ur"),
        ("kr", "ko"),
        ("ko", "ko"),
    ],
)
def test_language_tags_of_the_release(tag, code):
    assert Conversation.from_pangeains(pangeains_record(language=tag)).language == code


@pytest.mark.parametrize("image", [None, "", []])
def test_text_only_records(image):
    record = {"id": "NuminaMath-CoT_54842", "conversations": said("2+2?", "4"), "language": "en"}
    without = Conversation.from_pangeains(record)
    assert Conversation.from_pangeains(record | {"image": image}) == without
    assert (without.kind, without.images) == ("text", ())
    assert (without.source, without.category) == ("text-only/NuminaMath-CoT", "text-only")


@pytest.mark.parametrize(
    ("id", "source"),
    [
        ("Code-Feedback_59215", "text-only/Code-Feedback"),
        ("Openhermes-2.5_7", "text-only/Openhermes-2.5"),
        ("59215", "text-only"),
        ("a b_1", "text-only"),
        ("x/y_1", "text-only"),
    ],
)
def test_source_of_a_text_is_in_its_id(id, source):
    record = {"id": id, "conversations": said("2+2?", "4"), "language": "en"}
    assert Conversation.from_pangeains(record).source == source


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("a/1.jpg", "a/1.jpg"),
        ("./a//1.jpg", "a/1.jpg"),
        ("images/a/1.jpg", "images/a/1.jpg"),
        (" a/1.jpg", "a/1.jpg"),
        ("/data/tir/laion-multi-1M/images/1.jpg", "/data/tir/laion-multi-1M/images/1.jpg"),
        ("doc+chart/a b/ü (1).png.jpg", "doc+chart/a b/ü (1).png.jpg"),
        (["a/1.jpg"], "a/1.jpg"),
    ],
)
def test_paths_of_pictures(written, path):
    assert image_paths(written) == (path,)
    assert Conversation.from_pangeains(pangeains_record(image=written)).images == (path,)


def test_list_of_pictures_keeps_its_order():
    record = pangeains_record(
        image=["b/2.jpg", "b/1.jpg"], conversations=said("<image>?", "x", "<image> too?", "y")
    )
    assert Conversation.from_pangeains(record).images == ("b/2.jpg", "b/1.jpg")


def test_marker_keeps_its_place_in_the_text():
    for text in ("<image>\nwhat?", "what?\n<image>", "what <image> is?"):
        conversation = Conversation.from_pangeains(
            pangeains_record(conversations=said(text, " x\n"))
        )
        assert [turn.text for turn in conversation.turns] == [text, " x\n"]


def test_first_turn_that_is_not_human_is_dropped():
    turns = [{"from": "gpt", "value": "Hello!"}, *said("<image>?", "x")]
    conversation = Conversation.from_pangeains(pangeains_record(conversations=turns))
    assert [turn.text for turn in conversation.turns] == ["<image>?", "x"]


def test_fields_that_are_not_known_are_left_out():
    record = pangeains_record(url="http://x", model=None)
    assert Conversation.from_pangeains(record) == Conversation.from_pangeains(pangeains_record())


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("What is the man in the picture doing? He is riding a horse.", "en"),
        ("Bức tranh này vẽ gì? Một con mèo đang ngồi trên ghế.", "vi"),
        ("この画像には何が写っていますか。猫が椅子に座っています。", "ja"),
        ("이 그림에는 무엇이 있습니까? 고양이가 의자에 앉아 있습니다.", "ko"),
        ("Was ist auf dem Bild zu sehen? Eine Katze sitzt auf dem Stuhl.", "de"),
        ("מה רואים בתמונה? חתול יושב על כיסא.", "he"),
        ("اس تصویر میں کیا ہے؟ ایک بلی کرسی پر بیٹھی ہے۔", "ur"),
    ],
)
def test_missing_language_is_identified_from_the_words(text, code):
    assert identify_language(f"<image>\n{text}") == code
    record = pangeains_record(conversations=said("<image>", text), language=None)
    found = Conversation.from_pangeains(record, default_language=identify_language)
    assert found.language == code


@pytest.mark.parametrize("text", ["42", "", "x^2 + 1", "Plastic"])
def test_language_of_hardly_any_words_is_not_guessed(text):
    assert identify_language(text) is None
    record = pangeains_record(conversations=said("<image>", text or "7"), language=None)
    with pytest.raises(RecordError, match="field language: language not identified"):
        Conversation.from_pangeains(record, default_language=identify_language)


def test_identified_language_must_be_one_of_ours():
    record = pangeains_record(language=None)
    with pytest.raises(RecordError, match="text looks like is"):
        Conversation.from_pangeains(record, default_language=lambda text: "is")


@pytest.mark.parametrize("text", ["42", "Það er köttur í stólnum, og hann sefur."])
def test_language_that_is_not_found_is_undetermined(text):
    record = pangeains_record(conversations=said("<image>", text), language=None)
    found = Conversation.from_pangeains(record, default_language=identify_or_und)
    assert found.language == languages.UNDETERMINED


def test_language_is_identified_without_a_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model must come with the package")

    monkeypatch.setattr("socket.socket.connect", refuse)
    language_id._detector.cache_clear()
    assert identify_language("What is the man in the picture doing?") == "en"


def test_half_a_surrogate_pair_does_not_stop_the_identifier():
    assert identify_language("What is the man in the picture \ud83d doing?") == "en"


def test_published_sample_of_pangeains():
    if not SAMPLE.is_file():
        pytest.skip(f"no PangeaIns sample at {SAMPLE}")
    records = json.loads(SAMPLE.read_text(encoding="utf-8"))
    for record in records:
        conversation = Conversation.from_pangeains(record, default_language=identify_language)
        written = conversation.to_pangeains()
        assert written["conversations"] == record["conversations"]
        assert written.get("image") == record.get("image")
        # The records without a language are in English.
        tag = record.get("language", "en")
        assert conversation.language == languages.get(tag).code
        assert conversation.id == str(record["id"])


def test_error_survives_pickling():
    error = RecordError("empty answer", "conversations[1].value", "detail", "7")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
