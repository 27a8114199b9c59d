"""Readers of crawls: Parquet and tar files, whole, damaged and cut off."""

import io
import json
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pangea_jax.curation import image_text
from pangea_jax.curation.image_text import Fault, Pair, Part

from .samples import picture


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_parts_are_row_groups_and_tars_but_not_the_lists_of_tars(tmp_path):
    table = pa.table({"TEXT": ["a", "b", "c"]})
    (tmp_path / "more").mkdir()
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    pq.write_table(table, tmp_path / "more" / "00000.parquet")
    write_tar(tmp_path / "more" / "00000.tar", {"1.txt": b"a"})
    parts = image_text.find_parts(tmp_path)
    assert [(p.path.removeprefix(f"{tmp_path}/"), p.row_group) for p in parts] == [
        ("b.parquet", 0),
        ("b.parquet", 1),
        ("more/00000.tar", None),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*\.parquet"):
        image_text.find_parts(tmp_path / "empty")


def test_laions_columns_are_read_as_they_are(tmp_path):
    row = {"SAMPLE_ID": 2433684022797.0, "URL": "https://a.example/1.jpg", "TEXT": " 富士山 "}
    row |= {"HEIGHT": 300, "WIDTH": 400, "LICENSE": "?", "LANGUAGE": "ja", "NSFW": "UNLIKELY"}
    pq.write_table(pa.Table.from_pylist([row | {"similarity": 0.31}]), tmp_path / "x.parquet")
    (pair,) = image_text.read(Part(str(tmp_path / "x.parquet"), 0))
    size = {"width": 400, "height": 300}
    expected = Pair("2433684022797.0", "富士山", row["URL"], "ja", "UNLIKELY", 0.31, **size)
    assert pair == expected


def test_large_row_groups_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(image_text, "PART_ROWS", 300)
    rows = [{"URL": "http://a.example/", "TEXT": f"text {n}"} for n in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=700)
    parts = image_text.find_parts(tmp_path)
    places = [(part.row_group, part.first_row) for part in parts]
    assert places == [(0, 0), (0, 300), (0, 600), (1, 0)]
    read = [list(image_text.read(part)) for part in parts]
    assert [len(some) for some in read] == [300, 300, 100, 300]
    assert [pair.text for some in read for pair in some] == [row["TEXT"] for row in rows]
    assert (read[1][0].id, read[3][-1].id) == ("x-0-300", "x-1-299")


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("TEXT", "  ", "no alt text"),
        ("TEXT", 5, "no alt text"),
        ("URL", None, "neither picture nor address"),
        ("LANGUAGE", 7, "field is of the wrong type"),
        ("image", "not bytes", "picture is not bytes"),
    ],
)
def test_rows_of_the_wrong_kind_are_faults(tmp_path, column, value, reason):
    row = {"TEXT": "a text", "URL": "https://a.example/1.jpg", "LANGUAGE": "ja"} | {column: value}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert list(image_text.read(Part(str(tmp_path / "x.parquet"), 0))) == [Fault("x-0-0", reason)]


def test_a_file_without_alt_text_is_a_fault_for_each_row(tmp_path):
    pq.write_table(pa.table({"URL": ["a", "b"]}), tmp_path / "x.parquet")
    found = list(image_text.read(Part(str(tmp_path / "x.parquet"), 0)))
    assert found == [Fault(f"x-0-{n}", "no column of alt text") for n in range(2)]


def test_samples_of_a_tar_are_found_where_they_lie(tmp_path):
    body = picture()
    files = {
        "a/1.jpg": body,
        "a/1.txt": b"one",
        "b/1.txt": b"two",
        "b/1.cls": b"7",
        "b/1.jpg": body,
    }
    write_tar(tmp_path / "x.tar", files)
    first, second = image_text.read(Part(str(tmp_path / "x.tar")))
    assert (first.id, first.text, second.id, second.text) == (
        "x-a/1",
        "one",
        "x-b/1",
        "two",
    )
    assert first.place.read(tmp_path) == second.place.read(tmp_path) == body
    assert first.place.offset != second.place.offset


@pytest.mark.parametrize("cut", [0.2, 0.45, 0.9])
def test_a_tar_that_is_cut_off_gives_what_is_whole_and_one_fault(tmp_path, cut):
    files = {}
    for n in range(6):
        files |= {f"{n}.jpg": picture(n), f"{n}.txt": f"text {n}".encode()}
    write_tar(tmp_path / "x.tar", files)
    whole = list(image_text.read(Part(str(tmp_path / "x.tar"))))
    assert len(whole) == 6
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: int(cut * len(data.rstrip(b"\0")))])
    *pairs, fault = image_text.read(Part(str(tmp_path / "x.tar")))
    assert pairs == whole[: len(pairs)] and len(pairs) == int(cut * 6)
    assert fault.reason == "tar file is damaged or cut off"


def test_ids_differ_between_the_outputs_of_img2dataset(tmp_path):
    """Each begins anew with 00000.tar and the key 000000000."""
    listed = {"TEXT": ["one"], "URL": ["http://a.example/"]}
    for folder in ("sw", "yo"):
        (tmp_path / folder / "x").mkdir(parents=True)
        stated = json.dumps({"key": "000000000", "caption": "one"}).encode()
        files = {"000000000.jpg": picture(), "000000000.json": stated, "000000001.txt": b"two"}
        write_tar(tmp_path / folder / "00000.tar", files)
        pq.write_table(
            pa.table(listed | {"key": ["000000000"]}), tmp_path / folder / "00001.parquet"
        )
        pq.write_table(pa.table(listed), tmp_path / folder / "x" / "00000.parquet")
        pq.write_table(pa.table(listed | {"uid": [folder]}), tmp_path / folder / "y.parquet")
        (tmp_path / folder / "z.parquet").write_bytes(b"no Parquet")
    found = [row.id for part in image_text.find_parts(tmp_path) for row in image_text.read(part)]
    names = ("00000-000000000", "00000-000000001", "00001-000000000", "x/00000-0-0", "z.parquet")
    expected = [f"{folder}/{name}" for folder in ("sw", "yo") for name in names]
    assert sorted(found) == sorted([*expected, "sw", "yo"])


def test_numbers_that_no_float_holds_are_unknown(tmp_path):
    stated = {"key": "7", "caption": "a text", "width": 10**400, "similarity": 0.4}
    files = {"1.jpg": picture(), "1.json": json.dumps(stated).encode()}
    write_tar(tmp_path / "x.tar", files)
    (pair,) = image_text.read(Part(str(tmp_path / "x.tar")))
    assert (pair.id, pair.width, pair.similarity) == ("x-1", None, 0.4)


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_text, "MAX_PICTURE_BYTES", 1000)
    monkeypatch.setattr(image_text, "MAX_TEXT_BYTES", 10)
    files = {"1.jpg": picture(), "1.txt": b"one", "2.txt": b"a longer text"}
    write_tar(tmp_path / "x.tar", files)
    found = list(image_text.read(Part(str(tmp_path / "x.tar"))))
    assert found == [
        Fault("x-1", "picture file is too large"),
        Fault("x-2", "txt file is too large"),
    ]


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_damage_anywhere_loses_rows_to_faults_and_nothing_else(tmp_path, compression):
    rows = [{"URL": f"http://a.example/{n}", "TEXT": f"texto número {n}"} for n in range(40)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression=compression)
    whole, luck = path.read_bytes(), random.Random(compression)
    lost = 0
    for _ in range(80):
        data = bytearray(whole)
        for place in luck.choices(range(len(data)), k=luck.choice([1, 5, 20])):
            data[place] = luck.randrange(256)
        path.write_bytes(data[: luck.choice([None, luck.randrange(len(data))])])
        found = [row for part in image_text.find_parts(path) for row in image_text.read(part)]
        faults = [row.reason for row in found if isinstance(row, Fault)]
        assert len(found) == 40 or faults == ["Parquet file cannot be read"]
        lost += bool(faults)
    assert 20 < lost < 80


def test_file_names_are_safe_whatever_the_id():
    body = picture(kind="PNG")
    assert image_text.file_name("2433684022797.0", body) == "2433684022797.0.png"
    for id in ("../../etc/passwd", "a/b", "", "x" * 200, "naïve", ".hidden", "a\nb"):
        name = image_text.file_name(id, body)
        assert name.endswith(".png") and len(name) == 28 and name[:24].isalnum()
