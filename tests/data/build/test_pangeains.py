"""Building a store of PangeaIns: what goes in, what is left out, and what a kill leaves behind."""

import io
import json
import os
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from pangea_jax.data import chat
from pangea_jax.data.build import pangeains
from pangea_jax.data.build.pangeains import Build, BuildError, TooManyRejected
from pangea_jax.data.build.records import Records
from pangea_jax.data.image import decode
from pangea_jax.data.store import RecordStore
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.sample import emoji
from pangea_jax.work import restart
from pangea_jax.work.restart import WorkError
from pangea_jax.work.runners import Beam, Local
from tests.data.build.released import (
    PICTURES,
    RECORDS,
    SMALL,
    Killed,
    KilledAfter,
    digests,
    encoded,
    make,
    noise,
    record,
    write_source,
)

SAMPLE = Path(__file__).parents[4] / "shared/data/pangeains_sample"
TOKENIZER = Path(__file__).parents[4] / "shared/data/tokenizer_qwen3"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"), RECORDS, PICTURES)


@pytest.fixture(scope="module")
def out(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "store"
    make(source, out, tokenizer=emoji.DIRECTORY, **SMALL)
    return out


def test_store_holds_every_record_and_every_picture_once(out):
    store = RecordStore(out)
    store.verify()
    found = list(store.records("train"))
    assert [r.id for r in found] == [r["id"] for r in RECORDS]
    assert [[t.text for t in r.turns] for r in found] == [
        [turn["value"] for turn in r["conversations"]] for r in RECORDS
    ]
    assert found[19].images == ("images/general/set/1.jpg", "images/general/set/9.jpg")
    assert store.image_index["key"].to_pylist() == [f"images/{name}" for name in sorted(PICTURES)]
    for name, data in PICTURES.items():
        assert store.image(f"images/{name}") == data
    with pytest.raises(KeyError, match=r"no picture 'images/general/set/77\.jpg'"):
        store.image("images/general/set/77.jpg")


def test_index_says_all_that_is_chosen_by(out):
    store = RecordStore(out)
    rows = store.index.to_pylist()
    tokenizer = load_tokenizer(emoji.DIRECTORY)
    assert [row["position"] for row in rows] == list(range(20))
    assert [(row["shard"], row["row"]) for row in rows] == [divmod(n, 4) for n in range(20)]
    for row, conversation in zip(rows, store.records("train"), strict=True):
        assert row["id"] == conversation.id
        assert row["num_images"] == len(conversation.images) == len(row["image_sizes"])
        assert row["num_turns"] == len(conversation.turns)
        for key, size in zip(conversation.images, row["image_sizes"], strict=True):
            assert tuple(size) == decode(store.image(key)).size
        # A picture of five tokens takes five more.
        layout = np.arange(1, 6, dtype=np.int32)
        pictures = [layout] * len(conversation.images)
        tiles = [1] * len(pictures)
        rendered = chat.render(
            conversation.turns, tokenizer, pictures, tiles_per_image=tiles, patches=5
        )
        assert row["num_tokens"] == len(rendered.tokens) - 5 * len(pictures)
    assert (rows[0]["source"], rows[0]["category"], rows[0]["kind"]) == (
        "general/set",
        "general",
        "image",
    )
    assert (rows[18]["source"], rows[18]["category"], rows[18]["image_sizes"]) == (
        "text-only/NuminaMath",
        "text-only",
        [],
    )
    assert Counter(row["language"] for row in rows) == {"en": 11, "sw": 9}


def test_token_count_is_null_without_a_tokenizer(source, tmp_path):
    make(source, tmp_path / "o", **SMALL)
    assert RecordStore(tmp_path / "o").index["num_tokens"].null_count == 20


def test_tfds_reads_all_shards(out):
    records = tfds.builder_from_directory(out / "records" / "1.0.0").as_data_source("train")
    assert [r["id"].decode() for r in records] == [r["id"] for r in RECORDS]
    pictures = tfds.builder_from_directory(out / "images" / "1.0.0").as_data_source("images")
    assert {p["key"].decode(): p["encoded"] for p in pictures} == {
        f"images/{name}": data for name, data in PICTURES.items()
    }
    assert len(list((out / "images" / "1.0.0").glob("*.array_record-*"))) > 2


def test_same_bytes_whatever_the_number_of_workers(source, out, tmp_path):
    build = Build(source, tmp_path / "o", tokenizer=emoji.DIRECTORY, **SMALL)
    with Local(3) as run:
        pangeains.build(build, run)
    assert digests(tmp_path / "o") == digests(out)


def test_same_bytes_from_a_beam_pipeline(source, out, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is an extra: pip install apache-beam")
    build = Build(source, tmp_path / "o", tokenizer=emoji.DIRECTORY, **SMALL)
    pangeains.build(build, Beam(["--runner=DirectRunner"]))
    assert digests(tmp_path / "o") == digests(out)


def test_killed_at_any_step_it_goes_on(source, out, tmp_path):
    build = Build(source, tmp_path / "o", tokenizer=emoji.DIRECTORY, **SMALL)
    steps = 0
    for after in range(1, 30):
        try:
            pangeains.build(build, KilledAfter(after, build))
            break
        except Killed:
            steps += 1
    assert steps > 12
    assert digests(tmp_path / "o") == digests(out)


@pytest.mark.parametrize("moved", range(1, 11, 2))
def test_killed_while_moving_into_place_it_goes_on(source, out, tmp_path, monkeypatch, moved):
    replace, left = os.replace, moved

    def killed(made, target):
        nonlocal left
        if f"/{pangeains.WORK}/" not in str(target) and not left:
            raise Killed
        left -= f"/{pangeains.WORK}/" not in str(target)
        replace(made, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        make(source, tmp_path / "o", tokenizer=emoji.DIRECTORY, **SMALL)
    monkeypatch.undo()
    make(source, tmp_path / "o", tokenizer=emoji.DIRECTORY, **SMALL)
    assert digests(tmp_path / "o") == digests(out)


@pytest.mark.parametrize("name", ["raw/00001.jsonl.zst", "parsed/00001.parquet", "raw.json"])
@pytest.mark.parametrize("flip", [True, False])
def test_a_damaged_file_of_a_killed_build_is_named(source, out, tmp_path, name, flip):
    build = Build(source, tmp_path / "o", tokenizer=emoji.DIRECTORY, **SMALL)
    with pytest.raises(Killed):
        pangeains.build(build, KilledAfter(8, build))
    file = build.work / name
    content = bytearray(file.read_bytes())
    content[len(content) // 8] ^= 1  # in a page of Parquet, not in the description at its end
    file.write_bytes(content if flip and name != "raw.json" else content[:-9])
    with pytest.raises((WorkError, ValueError), match=rf"{name} is damaged.*remove it, and run"):
        if name.startswith("parsed"):
            list(map(Records(build).store, range(2)))
        else:
            (build.work / "parsed/00001.parquet").unlink()
            make(source, tmp_path / "o", tokenizer=emoji.DIRECTORY, **SMALL)
    file.unlink()
    make(source, tmp_path / "o", tokenizer=emoji.DIRECTORY, **SMALL)
    assert digests(tmp_path / "o") == digests(out)


def test_what_is_done_is_not_done_again(source, tmp_path):
    build = Build(source, tmp_path / "o", **SMALL)
    with pytest.raises(Killed):
        pangeains.build(build, KilledAfter(8, build))
    before = {p: p.stat().st_mtime_ns for p in build.work.rglob("*.parquet")}
    assert len(before) > 5
    with pytest.raises(Killed):
        pangeains.build(build, KilledAfter(12, build))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    summary = make(source, tmp_path / "o", **SMALL)
    finished = digests(tmp_path / "o")
    assert make(source, tmp_path / "o", **SMALL) == summary
    assert digests(tmp_path / "o") == finished
    assert not build.work.exists()


def test_two_builds_in_one_folder_are_refused(source, tmp_path):
    build = Build(source, tmp_path / "o", **SMALL)
    with restart.claim(build.work / "lock"), pytest.raises(WorkError, match="another process is"):
        make(source, tmp_path / "o", **SMALL)
    make(source, tmp_path / "o", **SMALL)


def test_folder_of_another_build_is_refused(source, out):
    differing = r"other settings \(limit is None there and 3 here\); give another --out"
    with pytest.raises(WorkError, match=differing):
        make(source, out, tokenizer=emoji.DIRECTORY, limit=3, **SMALL)


def test_a_folder_of_pictures_that_is_not_there_claims_nothing(source, tmp_path):
    with pytest.raises(BuildError, match=r"--images=.*nowhere: no such folder"):
        make(source, tmp_path / "o", images=tmp_path / "nowhere", **SMALL)
    make(source, tmp_path / "o", **SMALL)


@pytest.mark.parametrize("limit", [1, 4, 6, 100])
def test_limit_takes_the_first_records(source, tmp_path, limit):
    summary = make(source, tmp_path / "o", limit=limit, **SMALL)
    ids = RecordStore(tmp_path / "o").index["id"].to_pylist()
    assert ids == [r["id"] for r in RECORDS[:limit]]
    assert summary["total"] == len(ids)


def test_nothing_but_shards_is_removed_from_the_folder(tmp_path):
    write_source(tmp_path / "s", [record("r", "a/0.jpg")], {"images/a/0.jpg": _GOOD})
    make(tmp_path / "s", tmp_path / "s")
    assert (tmp_path / "s/images/a/0.jpg").read_bytes() == _GOOD


def test_record_with_several_bad_pictures_is_one_bad_record(tmp_path):
    names = [f"a/bad{n}.jpg" for n in range(5)]
    records = [record(f"r{n}", "a/good.jpg") for n in range(19)]
    records.append(record("bad", names, " ".join(["<image>"] * 5)))
    broken = dict.fromkeys(names, b"broken")
    write_source(tmp_path / "s", records, broken | {"a/good.jpg": _GOOD})
    assert make(tmp_path / "s", tmp_path / "o", 0.05, **SMALL)["kept"] == 19
    with pytest.raises(TooManyRejected, match="1 of 20 records") as caught:
        make(tmp_path / "s", tmp_path / "other", 0.04, **SMALL)
    assert caught.value.reasons.keys() == {"picture of no known format"}
    count, first = caught.value.reasons["picture of no known format"]
    assert (count, first[:41]) == (1, "PangeaIns.json, record 20 ('bad'), field ")


# Bad input. A good record stands before and after, and must come out unharmed.

CMYK = encoded(Image.new("CMYK", (20, 10), (0, 255, 255, 0)))
DEEP = encoded(Image.fromarray(np.full((10, 20), 40_000, np.uint16)), "PNG")
_palette = Image.new("P", (20, 10))
_palette.putpalette([10, 20, 30, 40, 50, 60])
PALETTE = encoded(_palette, "PNG", transparency=bytes([0, 255]))
ANIMATED = encoded(
    noise(20, 10), "GIF", save_all=True, append_images=[noise(20, 10, 1), noise(20, 10, 2)]
)
_exif = Image.Exif()
_exif[0x0112] = 6  # turned by 90 degrees
TURNED = encoded(noise(20, 10), exif=_exif)
BOMB = encoded(Image.new("1", (30_000, 30_000)), "PNG")


def build_one(tmp_path, bad, pictures, **options):
    """A build of good, bad, good; the store, the summary and the lines of rejected.jsonl."""
    good = {"a/good.jpg": encoded(noise(20, 10))}
    records = [record("first", "a/good.jpg"), bad, record("last", "a/good.jpg")]
    write_source(tmp_path / "s", records, good | pictures)
    summary = make(tmp_path / "s", tmp_path / "o", max_bad_fraction=0.5, **options)
    store = RecordStore(tmp_path / "o")
    store.verify()
    lines = (tmp_path / "o" / "rejected.jsonl").read_text().splitlines()
    return store, summary, [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("name", "data", "size"),
    [
        ("really.png", encoded(noise(20, 10), "JPEG"), (20, 10)),
        ("really.jpg", encoded(noise(20, 10), "WEBP"), (20, 10)),
        ("none", encoded(noise(20, 10), "PNG"), (20, 10)),
        ("cmyk.jpg", CMYK, (20, 10)),
        ("deep.png", DEEP, (20, 10)),
        ("palette.png", PALETTE, (20, 10)),
        ("animated.gif", ANIMATED, (20, 10)),
        ("turned.jpg", TURNED, (20, 10)),
        ("thin.png", encoded(noise(1, 4096), "PNG"), (1, 4096)),
    ],
)
def test_odd_pictures_are_kept_in_their_own_bytes(tmp_path, name, data, size):
    store, summary, rejected = build_one(tmp_path, record("odd", f"a/{name}"), {f"a/{name}": data})
    assert (summary["kept"], rejected) == (3, [])
    assert store.index["image_sizes"].to_pylist()[1] == [list(size)]
    kept = store.image(f"images/a/{name}")
    assert kept == data
    # As the reference: the first frame, not turned by EXIF, in RGB.
    assert (decode(kept).size, decode(kept).mode) == (size, "RGB")


_GOOD = encoded(noise(200, 100))


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (_GOOD[: len(_GOOD) // 2], "picture is damaged", "truncated"),
        (_GOOD[:-40], "picture is damaged", "truncated"),
        (b"<html>404</html>", "picture of no known format", "not a whole file of JPEG"),
        (b"", "picture of no known format", "not a whole file"),
        (BOMB, "picture is too large", "30000 x 30000|900000000 pixels"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "picture of 32-bit grey", "mode F"),
        (None, "picture is missing", "a/bad.jpg"),
    ],
)
def test_bad_pictures_are_left_out_and_counted(tmp_path, data, reason, detail):
    bad = record("bad", "a/bad.jpg")
    pictures = {} if data is None else {"a/bad.jpg": data}
    store, summary, rejected = build_one(tmp_path, bad, pictures)
    check_rejected(store, summary, rejected, bad, reason, detail)
    assert store.image_index["key"].to_pylist() == ["images/a/good.jpg"]


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        (record("bad", question="<image>?"), "markers and images differ in number", "0 in `image`"),
        (record("bad", ["a/good.jpg"] * 2), "markers and images differ in number", "1 <image>"),
        (record("bad", "a/good.jpg", answer=" \n"), "empty answer", ""),
        (record("bad", "../../etc/passwd"), "path is not allowed", "passwd"),
        (record("bad", "a/good.jpg", language="tlh"), "unknown language", "tlh"),
        ({"id": "bad"}, "field is missing", "no question and no answer, and no conversations"),
        (record("bad") | {"conversations": "hi"}, "wrong type", "expected a list of turns"),
        ("bad", "wrong type", "expected an object"),
    ],
)
def test_bad_records_are_left_out_and_counted(tmp_path, bad, reason, detail):
    check_rejected(*build_one(tmp_path, bad, {}), bad, reason, detail)


def firsts(summary):
    """Reason -> (number of records, id of the first one)."""
    found = summary["rejected"].items()
    return {reason: (count, re.search(r"\('(.*?)'\)", said)[1]) for reason, (count, said) in found}


def test_records_that_break_a_limit_are_left_out_and_counted(tmp_path):
    good = json.dumps(record("good", question="a?"))
    deep = '{"id": "deep", "conversations": ' + "[" * 100_000 + "]" * 100_000 + "}"
    broken = json.dumps(record("half", question="a\ud800?"))
    numbers = [good[:-1] + f', "n": {number}}}' for number in ("9" * 5_000, "NaN", 1 << 64)]
    source = write_source(tmp_path / "s", [], {})
    records = [good, deep, broken, *numbers, good]
    (source / "PangeaIns.json").write_text("[" + ", ".join(records) + "]")
    summary = make(source, tmp_path / "o", max_bad_fraction=0.9)
    assert firsts(summary) == {"cannot be read": (4, "deep"), "not valid Unicode": (1, "half")}
    assert (summary["total"], summary["kept"]) == (7, 2)
    lines = (tmp_path / "o" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["deep", "half", "good", "good", "good"]


def test_bombs_links_and_pipes_are_left_out_and_counted(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(20 << 20))
    (tmp_path / "secret.png").write_bytes(_GOOD)
    source = tmp_path / "s"
    names = ("bomb.png", "a/link.png", "a/pipe.png", "a/good.png")
    write_source(
        source,
        [record(name, name) for name in names],
        {"b.zip": stream.getvalue(), "a/good.png": _GOOD},
    )
    (source / "a/link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(source / "a/pipe.png")
    summary = make(source, tmp_path / "o", max_bad_fraction=0.9)
    assert firsts(summary) == {
        "picture cannot be read": (1, "bomb.png"),
        "picture is outside of the source": (1, "a/link.png"),
        "picture is not a regular file": (1, "a/pipe.png"),
    }
    assert make(source, tmp_path / "all", max_bad_fraction=0.9, follow_links=True)["kept"] == 2
    (source / "PangeaIns.json").rename(tmp_path / "records.json")
    (source / "PangeaIns.json").symlink_to(tmp_path / "records.json")
    with pytest.raises(BuildError, match=r"PangeaIns\.json is a symbolic link out of the source"):
        make(source, tmp_path / "other", max_bad_fraction=0.9)


def check_rejected(store, summary, rejected, bad, reason, detail):
    assert store.index["id"].to_pylist() == ["first", "last"]
    assert [r.id for r in store.records("train")] == ["first", "last"]
    assert {name: count for name, (count, _) in summary["rejected"].items()} == {reason: 1}
    assert len(rejected) == 1
    place = rejected[0]["file"], rejected[0]["number"]
    assert (*place, rejected[0]["reason"]) == ("PangeaIns.json", 2, reason)
    assert rejected[0]["remedy"]
    assert any(part in rejected[0]["detail"] for part in detail.split("|"))
    assert rejected[0]["record"] == bad


def test_record_with_one_bad_picture_of_two_is_left_out(tmp_path):
    bad = record("bad", ["a/good.jpg", "a/bad.jpg"], "<image> <image>?")
    store, summary, rejected = build_one(tmp_path, bad, {"a/bad.jpg": _GOOD[:500]})
    check_rejected(store, summary, rejected, bad, "picture is damaged", "a/bad.jpg: cannot be")


def test_very_long_turns_are_kept_and_counted(tmp_path):
    long = record("long", "a/good.jpg", "<image>\n" + "cat " * 20_000, "dog " * 20_000)
    store, _, rejected = build_one(tmp_path, long, {}, tokenizer=emoji.DIRECTORY)
    assert rejected == []
    assert store.index["num_tokens"].to_pylist()[1] > 40_000
    assert store.records("train")[1].turns[1].text == "dog " * 20_000


def test_pictures_without_a_marker_are_put_in_front(tmp_path):
    odd = record("odd", "a/good.jpg", "no marker")
    store, summary, rejected = build_one(tmp_path, odd, {})
    assert rejected == []
    assert store.records("train")[1].turns[0].text == "<image>\nno marker"
    assert summary["notes"] == {"pictures without <image> in the text; put in front": 1}


def test_language_that_is_not_identified_is_kept_or_refused(tmp_path):
    odd = record("odd", "a/good.jpg", "<image> 4", "5", language=None)
    store, summary, rejected = build_one(tmp_path / "kept", odd, {})
    assert (store.index["language"].to_pylist(), rejected) == (["en", "und", "en"], [])
    assert (summary["languages_undetermined"], summary["languages_identified"]) == (1, 0)
    strict = build_one(tmp_path / "strict", odd, {}, strict_language=True)
    check_rejected(*strict, odd, "language not identified", "")


def test_missing_language_is_identified(tmp_path):
    question = "<image>\nWas ist auf diesem Bild zu sehen, und wo steht das Haus?"
    bad = record("german", "a/good.jpg", question, "Ein altes Haus am See.", language=None)
    store, summary, _ = build_one(tmp_path, bad, {})
    assert store.index["language"].to_pylist() == ["en", "de", "en"]
    assert summary["languages_identified"] == 1


def test_default_language_is_taken_as_given(tmp_path):
    bad = record("short", "a/good.jpg", answer="5", language="")
    store, summary, _ = build_one(tmp_path, bad, {}, default_language="ga")
    assert store.index["language"].to_pylist() == ["en", "ga", "en"]
    assert summary["languages_identified"] == 0


def test_too_many_bad_records_stop_the_build_until_put_right(tmp_path):
    records = [record(f"r{n}", f"a/{n}.jpg") for n in range(20)]
    pictures = {f"a/{n}.jpg": encoded(noise(20, 10, n)) for n in range(20)}
    broken = pictures | {"a/3.jpg": b"broken", "a/4.jpg": _GOOD[:300]}
    del broken["a/17.jpg"], broken["a/18.jpg"]
    write_source(tmp_path / "s", records, broken)
    with pytest.raises(TooManyRejected, match=r"2 of 20 records \(10\.0%\)") as caught:
        make(tmp_path / "s", tmp_path / "o", 0.05, **SMALL)
    count, first = caught.value.reasons["picture is missing"]
    assert (count, first.startswith("PangeaIns.json, record 18 ('r17'), field image")) == (2, True)
    assert f"looked for {tmp_path}/s/a/17.jpg; put the file there" in first
    lines = (tmp_path / "o" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"]["id"] for line in lines] == ["r17", "r18"]
    assert not (tmp_path / "o" / "manifest.json").exists()
    for name in ("a/17.jpg", "a/18.jpg"):
        (tmp_path / "s" / name).write_bytes(pictures[name])
    with pytest.raises(TooManyRejected) as caught:
        make(tmp_path / "s", tmp_path / "o", 0.05, **SMALL)
    assert "1  picture is damaged: PangeaIns.json, record 5 ('r4'), field image: a/4.jpg" in str(
        caught.value
    )
    assert "--max_bad_fraction=0.05" in str(caught.value)
    assert make(tmp_path / "s", tmp_path / "o", 0.1, **SMALL)["kept"] == 18
    assert len(RecordStore(tmp_path / "o").index) == 18


def test_rejected_records_are_written_out(tmp_path):
    bad = [record(f"bad{n}", f"a/missing{n}.jpg") for n in range(50)]
    good = [record(f"good{n}", "a/good.jpg") for n in range(50)]
    mixed = [r for pair in zip(good, bad, strict=True) for r in pair]
    write_source(tmp_path / "s", mixed, {"a/good.jpg": encoded(noise(20, 10))})
    summary = make(tmp_path / "s", tmp_path / "o", 0.5, **SMALL)
    lines = (tmp_path / "o" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"bad{n}" for n in range(50)]
    count, first = summary["rejected"]["picture is missing"]
    assert (count, first[:36]) == (50, "PangeaIns.json, record 2 ('bad0'), f")
    assert make(tmp_path / "s", tmp_path / "o", 0.5, **SMALL) == summary
    store = RecordStore(tmp_path / "o")
    assert [r.id for r in store.records("train")] == [f"good{n}" for n in range(50)]


def test_chunks_without_a_good_record_leave_no_shard(tmp_path):
    records = [record(f"r{n}", None if 4 <= n < 8 else "a/good.jpg") for n in range(12)]
    write_source(tmp_path / "s", records, {"a/good.jpg": encoded(noise(20, 10))})
    make(tmp_path / "s", tmp_path / "o", 0.5, **SMALL)
    store = RecordStore(tmp_path / "o")
    assert store.index["shard"].to_pylist() == [0] * 4 + [1] * 4
    assert [r.id for r in store.records("train")] == [f"r{n}" for n in (0, 1, 2, 3, 8, 9, 10, 11)]
    folder = tmp_path / "o" / "records" / "1.0.0"
    assert len(tfds.builder_from_directory(folder).as_data_source("train")) == 8


def test_text_alone_needs_no_pictures(tmp_path):
    write_source(tmp_path / "s", [record("Code_1", question="2?", answer="3")], {})
    make(tmp_path / "s", tmp_path / "o")
    store = RecordStore(tmp_path / "o")
    assert (len(store.records("train")), store.collections) == (1, ())


def test_worker_that_is_killed_says_so():
    with Local(2) as run, pytest.raises(WorkError, match="a worker was killed"):
        list(run(os._exit, [1, 2, 3]))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no PangeaIns sample in ../shared")
def test_published_sample(tmp_path):
    options = {"tokenizer": TOKENIZER, "image_id": 151_646} if TOKENIZER.is_dir() else {}
    summary = make(SAMPLE, tmp_path / "o", **options)
    assert (summary["total"], summary["kept"], summary["pictures"]) == (135, 135, 120)
    assert summary["languages_identified"] == 15
    store = RecordStore(tmp_path / "o")
    store.verify()
    released = json.loads((SAMPLE / "PangeaIns.json").read_text(encoding="utf-8"))
    for raw, found in zip(released, store.records("train"), strict=True):
        assert [turn.text for turn in found.turns] == [t["value"] for t in raw["conversations"]]
        for path, key in zip([raw["image"]] if "image" in raw else [], found.images, strict=True):
            assert store.image(key) == (SAMPLE / path).read_bytes()
    languages = Counter(store.index["language"].to_pylist())
    assert languages["en"] == 60
    assert (languages["zh"], languages["ur"], languages["ko"]) == (10, 5, 3)
