"""Stores of someone's own data: every form gives the same store, and nothing is lost without a word."""

import json
import unicodedata

import pytest

from pangea_jax.data.build.pangeains import TooManyRejected
from pangea_jax.data.build.plan import BuildError
from pangea_jax.data.chat import SYSTEM_PROMPT
from pangea_jax.data.pipeline import PipelineConfig, RowSource, render_example
from pangea_jax.data.store import RecordStore
from pangea_jax.sample import emoji
from pangea_jax.work.restart import WorkError
from tests.data.build import own
from tests.data.build.own import FORMS, OPTIONS, PICTURES, ROWS, build, built, lines, llava, table
from tests.data.build.released import encoded, noise
from tests.data.made import reader_of


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = own.write_pictures(tmp_path_factory.mktemp("own"))
    own.array(folder)
    build(folder, folder / "out", tokenizer=emoji.DIRECTORY)
    store = RecordStore(folder / "out")
    store.verify()
    for row, record in zip(ROWS, store.records("train"), strict=True):
        question, answer = record.turns
        assert (record.id, record.language, record.source) == (row["id"], row["language"], "own")
        assert (question.text, answer.text) == (f"<image>\n{row['question']}", row["answer"])
        assert store.image(record.images[0]) == PICTURES[row["image"]]
    return built(folder / "out")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_store(form, expected, tmp_path):
    source = FORMS[form](own.write_pictures(tmp_path / "s"))
    source = source if hasattr(source, "is_dir") else tmp_path / "s"
    options = {"images": tmp_path / "s", "tokenizer": emoji.DIRECTORY} | OPTIONS.get(form, {})
    build(source, tmp_path / "o", **options)
    assert built(tmp_path / "o") == expected


def test_pictures_in_a_tar_file_are_found(tmp_path):
    import tarfile

    folder = own.write_pictures(tmp_path / "s")
    with tarfile.open(folder / "pics.tar", "w") as tar:
        tar.add(folder / "pics", "pics")
    for path in (folder / "pics").iterdir():
        path.unlink()
    table(folder)
    assert build(folder, tmp_path / "o")["kept"] == 60
    store = RecordStore(tmp_path / "o")
    assert store.image(store.records("train")[7].images[0]) == PICTURES["pics/7.png"]


def one(tmp_path, *records, pictures=None, **options):
    """A build of records in JSON lines: the store and its summary."""
    for name, data in (pictures or {"a.png": encoded(noise(16, 12), "PNG")}).items():
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_bytes(data)
    lines(tmp_path / "s", records)
    summary = build(tmp_path / "s", tmp_path / "o", **options)
    return RecordStore(tmp_path / "o"), summary


TURNS = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A cat."}]


def test_what_is_moved_or_not_used_is_said_once_with_its_count(tmp_path):
    record = {"images": ["a.png"], "conversations": TURNS, "language": "en", "url": "http://x"}
    hello = {"from": "gpt", "value": "Hello!"}
    greeted = record | {"conversations": [hello, *TURNS], "score": 3}
    store, summary = one(tmp_path, record, record, greeted)
    assert [r.turns[0].text for r in store.records("train")] == ["<image>\nWhat is this?"] * 3
    assert [r.id for r in store.records("train")] == ["data:1", "data:2", "data:3"]
    assert summary["notes"] == {
        "field url is not used": 3,
        "pictures without <image> in the text; put in front": 3,
        "field score is not used": 1,
        "first turn is an answer without a question; left out": 1,
    }


def test_pictures_without_a_mark_are_rejected_on_request(tmp_path):
    record = {"images": ["a.png"], "conversations": TURNS, "language": "en"}
    said = r"data\.jsonl, record 1 \('data:1'\), field images: 1 in images, no <image> in the text"
    with pytest.raises(TooManyRejected, match=f"{said}; write <image> at the place of each"):
        one(tmp_path, record, unmarked="reject")


@pytest.mark.parametrize("where", ["turn", "field"])
def test_a_system_prompt_is_stored_and_rendered(tmp_path, tiny_config, letters, where):
    record = {"id": "a", "conversations": TURNS, "language": "en"}
    prompt = "Answer as a child would."
    if where == "turn":
        record["conversations"] = [{"from": "system", "value": prompt}, *TURNS]
    else:
        record["system"] = prompt
    plain = {"id": "b", "conversations": TURNS, "language": "en"}
    store, summary = one(tmp_path, record, plain, tokenizer=emoji.DIRECTORY)
    assert summary["notes"] == {}
    first, second = store.records("train")
    assert (first.system, second.system, first.turns) == (prompt, "", second.turns)
    reader = reader_of(tiny_config, letters, store)
    config = PipelineConfig(rows=1, row_tokens=512, row_tiles=1)
    texts = [
        letters.decode(render_example(r, None, reader, config).tokens) for r in (first, second)
    ]
    assert [prompt in text for text in texts] == [True, False]
    assert [SYSTEM_PROMPT in text for text in texts] == [False, True]
    # The index counts the words of the prompt that is rendered.
    counts = store.index["num_tokens"].to_pylist()
    assert counts[0] != counts[1]
    sizes = RowSource(store, [0, 1]).indexed_sizes
    assert sizes is not None


def test_thirty_short_sentences_do_not_stop_a_build(tmp_path):
    # The identifier knows little Swahili.
    pairs = [("Hii ni rangi gani?", "Ni nyekundu."), ("Unaona nini?", "Naona nyumba.")]
    records = [{"question": q, "answer": a} for q, a in pairs * 15]
    store, summary = one(tmp_path, *records)
    assert set(store.index["language"].to_pylist()) == {"und"}
    assert (summary["languages_undetermined"], summary["languages_identified"]) == (30, 0)
    with pytest.raises(TooManyRejected, match=r"record 1 .*field language: .*--default_language"):
        build(tmp_path / "s", tmp_path / "strict", strict_language=True)
    build(tmp_path / "s", tmp_path / "given", default_language="sw")
    assert set(RecordStore(tmp_path / "given").index["language"].to_pylist()) == {"sw"}


def test_undetermined_records_are_drawn(tmp_path):
    from pangea_jax.data.mixture import Mixture, choose

    records = [
        {"conversations": TURNS, "language": "und"},
        {"conversations": TURNS, "language": "sw"},
    ]
    store, _ = one(tmp_path, *records)
    chosen = choose(store.index, Mixture(None, language_alpha=1.0, text_ratio=None))
    assert chosen.examples_per_language == {"sw": 1, "und": 1}


def test_a_phone_photograph_is_upright_in_index_and_reader(tmp_path, tiny_config, letters):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    photo = encoded(noise(400, 200), exif=exif)
    record = {"image": "a.jpg", "conversations": TURNS, "language": "en"}
    store, _ = one(tmp_path, record, pictures={"a.jpg": photo})
    build(tmp_path / "s", tmp_path / "stored", orientation="stored")
    as_stored = RecordStore(tmp_path / "stored")
    assert (store.orientation, as_stored.orientation) == ("upright", "stored")
    assert store.index["image_sizes"].to_pylist() == [[[200, 400]]]
    assert as_stored.index["image_sizes"].to_pylist() == [[[400, 200]]]
    (key,) = store.records("train")[0].images
    assert store.image(key) == photo  # its own bytes

    def tiles(of, **policy):
        pictures = reader_of(tiny_config, letters, of, **policy).pictures
        look = pictures.stored(key, several=False)
        assert look.place[0] == pictures.stored_place(key, several=False)[0] == len(look.cut())
        return look.cut().tolist()

    upright = tiles(store)
    assert upright == tiles(store, orientation="upright") == tiles(as_stored, orientation="upright")
    assert upright != tiles(as_stored)


def test_other_names_of_a_file_find_it(tmp_path):
    composed = unicodedata.normalize("NFC", "pics/café/à.png")
    apart = unicodedata.normalize("NFD", composed)
    mixed = unicodedata.normalize("NFD", "pics/café") + unicodedata.normalize("NFC", "/à.png")
    names = [composed, apart, mixed, str(tmp_path / "s" / composed)]
    records = [{"image": name, "conversations": TURNS, "language": "en"} for name in names]
    store, _ = one(tmp_path, *records, pictures={apart: encoded(noise(8, 8), "PNG")})
    keys = {key for record in store.records("train") for key in record.images}
    assert len(keys) == store.image_index.num_rows == 1


def test_pictures_beside_the_records_are_found_with_another_folder_of_pictures(tmp_path):
    (tmp_path / "other").mkdir()
    record = {"image": "a.png", "conversations": TURNS, "language": "en"}
    absolute = record | {"image": str(tmp_path / "s" / "a.png")}
    store, _ = one(tmp_path, record, absolute, images=tmp_path / "other")
    assert store.image_index.num_rows == 1


def test_absolute_path_below_the_folder_of_pictures(tmp_path):
    folder = own.write_pictures(tmp_path / "d/set")
    table(folder, [row | {"image": str(folder / row["image"])} for row in ROWS])
    for images in (None, tmp_path / "d", folder):
        out = tmp_path / f"o{images}".replace("/", "_")
        assert build(folder / "data.csv", out, images=images)["pictures"] == 60


def test_corrected_records_are_read_by_the_same_command(tmp_path):
    folder = own.write_pictures(tmp_path / "s")
    table(folder, [row | {"answer": "" if n == 7 else "x"} for n, row in enumerate(ROWS)])
    with pytest.raises(TooManyRejected, match=r"data\.csv, record 8 \('id-7'\), .*write an answer"):
        build(folder, tmp_path / "o")
    (rejected,) = map(json.loads, (tmp_path / "o/rejected.jsonl").read_text().splitlines())
    assert (rejected["file"], rejected["number"]) == ("data.csv", 8)
    assert rejected["record"]["id"] == "id-7"
    table(folder)
    assert build(folder, tmp_path / "o")["kept"] == 60
    assert (tmp_path / "o/rejected.jsonl").read_text() == ""
    assert len(RecordStore(tmp_path / "o").records("train")) == 60


def test_a_corrected_picture_gives_the_store_of_the_whole_one(tmp_path):
    records = [
        {"id": n, "image": f"{n}.png", "conversations": TURNS, "language": "en"} for n in "ab"
    ]
    whole = {f"{n}.png": encoded(noise(8, 8, seed), "PNG") for seed, n in enumerate("ab")}
    with pytest.raises(
        TooManyRejected, match=r"record 2 \('b'\), field image: b\.png: cannot be dec"
    ):
        one(tmp_path, *records, pictures=whole | {"b.png": whole["b.png"][:50]})
    (tmp_path / "s/b.png").write_bytes(whole["b.png"])
    build(tmp_path / "s", tmp_path / "o")
    build(tmp_path / "s", tmp_path / "fresh")
    assert built(tmp_path / "o") == built(tmp_path / "fresh")


# One bad record after a good one: what is wrong, and one sentence about it.


def bad_record(**changes):
    record = {"id": "bad", "image": "a.png", "conversations": TURNS, "language": "en"}
    return {k: v for k, v in (record | changes).items() if v is not None}


def say(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


BAD_RECORDS = {
    "missing picture": (
        bad_record(image="pics/x.png"),
        "image: looked for {s}/pics/x.png; put the",
    ),
    "outside": (
        bad_record(image="/etc/hostname"),
        "image: looked for /etc/hostname below {s}; put",
    ),
    "parent": (
        bad_record(image="../a.png"),
        "image: expected the path of a file, got '../a.png'; wr",
    ),
    "backslash": (
        bad_record(image="pics\\x.png"),
        r"image: 'pics\\x.png' is written with backslashes",
    ),
    "other case": (bad_record(image="A.PNG"), "there is 'a.png'; put the file there"),
    "address": (
        bad_record(image="https://x.org/a.png"),
        "download the picture, and write its path",
    ),
    "no picture file": (bad_record(image="data.jsonl"), "image: data.jsonl: cannot be decoded"),
    "number as picture": (
        bad_record(image=7),
        "image: expected a path or a list of paths, found 7",
    ),
    "no answer": (
        bad_record(conversations=TURNS[:1]),
        "last turn is not an answer: data.jsonl, record 2 ('bad'), field conversations[0].from; add",
    ),
    "roles": (bad_record(conversations=TURNS[:1] * 2), "expected 'gpt', got 'user'"),
    "tool": (
        bad_record(conversations=[{"role": "tool", "content": "x"}]),
        "expected one of human, user, gpt, assistant, system, found 'tool'; correct the name",
    ),
    "late system": (
        bad_record(conversations=[*TURNS, {"from": "system", "value": "Be brief."}]),
        "conversations[2]: 'Be brief.'; move it to the begin",
    ),
    "mark in an answer": (
        bad_record(conversations=say("<image>", "an <image>")),
        "<image> in an answer; remove <image> from the answer",
    ),
    "marks": (
        bad_record(conversations=say("<image> <image>?", "x")),
        "2 <image> in the turns, 1 in `image`; write one <image> for each picture, or none",
    ),
    "no conversation": (
        {"id": "bad", "label": 3},
        "no question and no answer, and no conversations or messages; the record has the fields id, label",
    ),
    "only an answer": (
        {"id": "bad", "image": "a.png", "text": "A cat."},
        "question: no question, and no conversations",
    ),
    "text of numbers": (
        bad_record(conversations=[{"from": "human", "value": ["a", 3]}]),
        "conversations[0].value[1]: expected a part, found 3",
    ),
    "language": (bad_record(language="swahilli"), "did you mean sw?"),
    "video": (
        bad_record(videos=["v.mp4"]),
        "field videos: expected pictures and texts alone; remove",
    ),
    "part": (
        bad_record(messages=say([{"type": "video", "video": "x"}], "y"), conversations=None),
        "messages[0].content[0].type: expected a text or an image, found a part of type 'video'",
    ),
    "a list": (["x"], "field record: expected an object with fields, found list"),
    "id": (bad_record(id=["x"]), "field id: expected a text or a number, got ['x']"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named_and_the_others_stay(name, tmp_path):
    record, said = BAD_RECORDS[name]
    good = {"image": "a.png", "conversations": TURNS, "language": "en"}
    store, summary = one(tmp_path, good, record, good, max_bad_fraction=0.5)
    assert store.index["id"].to_pylist() == ["data:1", "data:3"]
    ((reason, (count, sentence)),) = summary["rejected"].items()
    assert count == 1
    assert sentence.startswith("data.jsonl, record 2")
    assert said.format(s=tmp_path / "s") in f"{reason}: {sentence}"
    assert "\n" not in sentence
    assert len(sentence) < 500
    (line,) = (tmp_path / "o/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["record"] == record


def test_captions_take_the_question_that_is_given(tmp_path):
    captions = [{"file_name": "a.png", "text": "A cat."}, {"file_name": "a.png", "text": "A dog."}]
    store, summary = one(tmp_path, *captions, question="Describe the picture.")
    assert [r.turns[0].text for r in store.records("train")] == [
        "<image>\nDescribe the picture."
    ] * 2
    assert [r.turns[1].text for r in store.records("train")] == ["A cat.", "A dog."]
    assert summary["notes"] == {}


def test_a_wrong_name_of_a_column_is_named(tmp_path):
    with pytest.raises(
        BuildError, match=r"no record has the field 'lnag' of --columns=language=lnag; t"
    ):
        one(tmp_path, llava(ROWS[0]) | {"image": "a.png"}, columns={"language": "lnag"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "data.csv, byte 0: is empty; expected an array of records"),
        (b"\x1f\x8b\x08\x00", "is compressed with gzip; unpack it with gunzip"),
        (
            b"PK\x03\x04\x14\x00",
            "is compressed with zip; unpack it, or export an Excel sheet as CSV",
        ),
        ("image,question\n".encode("utf-16"), "is text in UTF-16, expected UTF-8; save it again"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR", "is of no known form; expected an array"),
        (b"just a text\nof two lines\n", "is of no known form; .* it begins with 'just a text"),
        (b"picture,asked,said\na.png,x,y\n", "line 1: none of the columns picture, asked, said is"),
        (b"image,answer,image\n", "line 1: two columns are called 'image'; rename one"),
        (
            b'image,question,answer\na.png,"x,y\n',
            "the row that begins in line 2: .*; close every quote",
        ),
        (b"image,caf\xe9,answer\na.png,x,y\n", "byte 0: line 1: not UTF-8; save the file"),
        (
            b'{\n "id": 1,\n "image": "a.png"\n}\n',
            "line 1: an object over several lines; expected an",
        ),
        (
            b'[{"id": 1}, {"id"',
            "ends inside the array, after 1 records; correct the file there, or",
        ),
        (b'{"id": 1}\n{"id": \n', "line 2: "),
        (b"PAR1\x00\x00", "is not a complete Parquet file"),
        (b"\xff\xff\xff\xff\x10\x00\x00\x00", "is not a complete Arrow file"),
        (b"image,question,answer\n", "data.csv holds no records; correct --source"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, said):
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(WorkError, match=said) as caught:
        build(tmp_path, tmp_path / "o")
    assert str(tmp_path / "data.csv") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_row_of_the_wrong_length_is_rejected_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(noise(8, 8), "PNG"))
    rows = "image,question,answer\na.png,What?,A cat, or a dog\na.png,What?,A cat\n,,\n\n"
    (tmp_path / "data.csv").write_text(rows)
    summary = build(tmp_path, tmp_path / "o", 0.5)
    ((reason, (count, sentence)),) = summary["rejected"].items()
    assert (reason, count, summary["kept"]) == ("wrong number of cells", 1, 1)
    said = "data.csv, record 1, field row: line 2 has 4 cells, the header has 3: ['a.png', 'What?'"
    assert sentence.startswith(said)
    assert sentence.endswith("put a cell with the delimiter in quotes")


def test_folders_that_hold_several_sets_are_named(tmp_path):
    with pytest.raises(WorkError, match=r"there is no such file or folder; correct --source"):
        build(tmp_path / "nowhere", tmp_path / "o")
    folder = own.write_pictures(tmp_path / "s")
    with pytest.raises(WorkError, match=r"holds no PangeaIns.json.*it has pics; correct --source"):
        build(folder, tmp_path / "o")
    with pytest.raises(
        WorkError, match=r"several splits \(test: test/data-.*, train: train/data-.*\); choose one"
    ):
        build(own.saved_splits(folder), tmp_path / "o")
    with pytest.raises(WorkError, match=r"no split 'dev', it has test, train; correct --split"):
        build(folder / "saved", tmp_path / "o", split="dev")
    table(folder, name="train.csv")
    table(folder, name="test.csv")
    with pytest.raises(WorkError, match=r"several splits \(test: test.csv, train: train.csv\)"):
        build(folder, tmp_path / "o")
    assert build(folder, tmp_path / "o", split="test")["kept"] == 60
    own.metadata(folder, "metadata.csv")
    with pytest.raises(WorkError, match=r"several sets of records \(metadata.csv, test.csv, train"):
        build(folder, tmp_path / "o3")
    (folder / "metadata.csv").unlink()
    own.array(folder, "train.json")
    with pytest.raises(WorkError, match=r"several sets of records \(train.csv, train.json\); name"):
        build(folder, tmp_path / "o2", split="train")


HEADER = "image,question,answer,language\n"
ROW = "pics/0.png,Hii ni nini?,Ni paka.,sw\n"


def records_of(text):
    """Writes a table of this text, and its pictures, into a folder."""

    def write(folder):
        data = text if isinstance(text, bytes) else text.encode()
        (own.write_pictures(folder) / "data.csv").write_bytes(data)

    return write


def line_of(**fields):
    def write(folder):
        own.write_pictures(folder)
        lines(
            folder, [{"question": "Hii ni nini?", "answer": "Ni paka.", "language": "sw"} | fields]
        )

    return write


REFUSED = {
    "no header": (ROW * 2, ["data.csv", "line 1", "pics/0.png", "in front"]),
    "utf-16 without a mark": ((HEADER + ROW).encode("utf-16-le"), ["data.csv", "UTF-16", "iconv"]),
    "latin-1": (
        (HEADER + ROW + ROW.replace("paka", "été")).encode("latin-1"),
        ["data.csv, record 2, field answer: line 3: not UTF-8", "write the text again in UTF-8"],
    ),
    "empty question": (
        HEADER + "pics/0.png,,Ni paka.,sw\n",
        ["data.csv, record 1 ('data:1'), field question", "give --question"],
    ),
    "drive of Windows": (
        HEADER + ROW.replace("pics/0.png", r"C:\Users\asha\pics\0.png"),
        ["data.csv, record 1", "field image", "backslashes; there is 'pics/0.png'; write"],
    ),
    "folder": (HEADER + ROW.replace("pics/0.png", "pics"), ["field image", "pics, which is a folder"]),
    "no base64": (
        {"image": "data:image/png;base64,@@@@"},
        ["data.jsonl, record 1", "field image: expected base64", "data:image/png"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_fault_is_named_with_file_record_field_and_remedy(name, tmp_path):
    written, said = REFUSED[name]
    write = line_of(**written) if isinstance(written, dict) else records_of(written)
    write(tmp_path / "s")
    with pytest.raises(WorkError) as told:
        build(tmp_path / "s", tmp_path / "o")
    assert all(part in str(told.value) for part in said), str(told.value)


NOTED = {
    "picture in another field": (
        HEADER.replace("image", "photo") + ROW,
        "field photo is not used, but has a picture; read it with --columns=image=photo",
    ),
    "empty picture": (
        HEADER + ROW + ROW.replace("pics/0.png", ""),
        "field image is empty; the record is a text",
    ),
    "same id": (
        "id," + HEADER + f"7,{ROW}7,{ROW}",
        "field id is that of an earlier record, such as data.csv, record 2 ('7'); "
        "both are kept; give each its own id",
    ),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_is_odd_is_kept_and_noted(name, tmp_path):
    text, note = NOTED[name]
    records_of(text)(tmp_path / "s")
    summary = build(tmp_path / "s", tmp_path / "o")
    assert summary["kept"] == summary["total"] == text.count("\n") - 1
    assert summary["notes"] == {note: 1}


def test_names_of_columns_may_have_capital_letters(tmp_path):
    records_of(HEADER.title() + ROW)(tmp_path / "s")
    assert build(tmp_path / "s", tmp_path / "o")["pictures"] == 1
