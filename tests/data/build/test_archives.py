"""Pictures of the release in folders and archives. Their bytes are their names here."""

import contextlib
import io
import pickle
import random
import sqlite3
import tarfile
import zipfile

import pytest

from pangea_jax.data.build.archives import JoinedFile, Pictures, find_archives
from pangea_jax.data.build.release import ReleaseError
from pangea_jax.data.record import RecordError


def tar(members, **options) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = len(name) * 100
            archive.addfile(info, io.BytesIO(name.encode() * 100))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return stream.getvalue()


def put(path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def cut(data: bytes, parts: int) -> list[bytes]:
    size = -(-len(data) // parts)
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.fixture
def source(tmp_path):
    """A release with pictures in every form."""
    folder = tmp_path / "release"
    put(folder / "general/cambrian/1.jpg", b"general/cambrian/1.jpg" * 100)
    put(folder / "general/plain.tar", tar([f"plain/{n}.jpg" for n in range(20)]))
    put(folder / "general/flat.tar", tar(["./1.png", "2.png"]))
    for number, part in enumerate(cut(tar([f"images/{n}.0.jpg" for n in range(30)]), 3)):
        put(folder / f"cultural/laion-multi-1M/part_{number:02d}", part)
    long = "deep/" * 40 + "name.jpg"
    for letter, part in zip("ab", cut(tar([long]), 2), strict=True):
        put(folder / f"general/ALLaVA-4V/allava_laion.tar.parta{letter}", part)
    with zipfile.ZipFile(folder / "doc.zip", "w") as archive:
        archive.writestr("doc/stored.png", "doc/stored.png" * 100)
        archive.writestr(
            "doc/deflated.png", "doc/deflated.png" * 100, compress_type=zipfile.ZIP_DEFLATED
        )
    return folder


@pytest.fixture
def pictures(source, tmp_path):
    pictures = Pictures(source, tmp_path / "archives.sqlite")
    pictures.index()
    return pictures


@pytest.mark.parametrize(
    ("path", "key", "content"),
    [
        ("general/cambrian/1.jpg", "general/cambrian/1.jpg", "general/cambrian/1.jpg"),
        ("images/general/cambrian/1.jpg", "general/cambrian/1.jpg", "general/cambrian/1.jpg"),
        ("general/plain/7.jpg", "general/plain/7.jpg", "plain/7.jpg"),
        ("images/general/plain/19.jpg", "general/plain/19.jpg", "plain/19.jpg"),
        ("general/flat/1.png", "general/1.png", "./1.png"),
        ("general/2.png", "general/2.png", "2.png"),
        (
            "cultural/laion-multi-1M/images/13.0.jpg",
            "cultural/laion-multi-1M/images/13.0.jpg",
            "images/13.0.jpg",
        ),
        (
            "/data/tir/projects/x/laion-multi-1M/images/29.0.jpg",
            "cultural/laion-multi-1M/images/29.0.jpg",
            "images/29.0.jpg",
        ),
        (
            "general/ALLaVA-4V/" + "deep/" * 40 + "name.jpg",
            "general/ALLaVA-4V/" + "deep/" * 40 + "name.jpg",
            "deep/" * 40 + "name.jpg",
        ),
        ("doc/stored.png", "doc/stored.png", "doc/stored.png"),
        ("doc/deflated.png", "doc/deflated.png", "doc/deflated.png"),
    ],
)
def test_pictures_are_found_and_read(pictures, path, key, content):
    found_key, place = pictures.find(path)
    assert found_key == f"images/{key}"
    assert pictures.read(place) == content.encode() * 100
    again = pickle.loads(pickle.dumps(pictures))
    assert again.read(place) == content.encode() * 100


@pytest.mark.parametrize(
    "path",
    [
        "general/cambrian/2.jpg",
        "1.jpg",
        "cambrian/1.jpg",
        "general/folder",
        "general/cambrian",
        "/elsewhere/1.jpg",
        "/data/tir/images/13.0.jpg",
        "x" * 5000,
    ],
)
def test_nothing_is_guessed(pictures, path):
    assert pictures.find(path) is None


def test_absolute_path_that_fits_two_folders(source, tmp_path):
    for folder in ("general", "caption"):
        put(source / folder / "COCO/train/1.jpg", b"x")
    pictures = Pictures(source, tmp_path / "archives.sqlite")
    pictures.index()
    with pytest.raises(RecordError, match=r"path is ambiguous .*caption/COCO/train, general/COCO"):
        pictures.find("/data/COCO/train/1.jpg")
    assert pictures.find("/data/caption/COCO/train/1.jpg")[0] == "images/caption/COCO/train/1.jpg"


def test_index_is_made_once_and_follows_changes(source, pictures, tmp_path):
    listed = []
    Pictures(source, tmp_path / "archives.sqlite").index(listed.append)
    assert listed == []
    put(source / "general/plain.tar", tar(["plain/new.jpg"]))
    changed = Pictures(source, tmp_path / "archives.sqlite")
    changed.index(listed.append)
    assert listed == [1]
    assert changed.find("general/plain/7.jpg") is None
    assert changed.read(changed.find("general/plain/new.jpg")[1]) == b"plain/new.jpg" * 100
    (source / "doc.zip").unlink()
    without = Pictures(source, tmp_path / "archives.sqlite")
    without.index()
    assert without.find("doc/stored.png") is None


def test_one_path_in_two_archives(tmp_path):
    folder = tmp_path / "release"
    for name in ("train", "val"):
        with zipfile.ZipFile(folder_of(folder / f"x/{name}.zip"), "w") as archive:
            archive.writestr("0.png", name)
    pictures = Pictures(folder, tmp_path / "archives.sqlite")
    pictures.index()
    for name in ("train", "val"):
        key, place = pictures.find(f"x/{name}/0.png")
        assert (key, pictures.read(place)) == (f"images/x/{name}/0.png", name.encode())
    put(folder / "x/own.png", b"loose")
    with zipfile.ZipFile(folder / "x/own.zip", "w") as archive:
        archive.writestr("own.png", "packed")
    pictures = Pictures(folder, tmp_path / "archives.sqlite")
    pictures.index()
    for path, data in {"x/own.png": b"loose", "x/own/own.png": b"packed"}.items():
        key, place = pictures.find(path)
        assert (key, pictures.read(place)) == (f"images/{path}", data)
    with pytest.raises(RecordError, match=r"ambiguous .* each of x/train\.zip, x/val\.zip"):
        pictures.find("x/0.png")
    with zipfile.ZipFile(folder / "x/train.tar.zip", "w") as archive:
        archive.writestr("1.png", "x")
    (folder / "x/val.zip").unlink()
    one = Pictures(folder, tmp_path / "archives.sqlite")
    assert one.changed() == ["x/train.tar.zip"]
    before = one.digest()
    one.index()
    assert one.digest() != before and one.changed() == []
    assert one.find("x/val/0.png") is None
    assert one.read(one.find("x/0.png")[1]) == b"train"


def test_list_as_earlier_versions_made_it_is_made_anew(source, pictures, tmp_path):
    old = tmp_path / "old.sqlite"
    listed = sqlite3.connect(tmp_path / "archives.sqlite").execute("SELECT * FROM archives")
    with contextlib.closing(sqlite3.connect(old)) as database, database:
        database.execute(
            "CREATE TABLE archives (name TEXT PRIMARY KEY, folder, stem, parts, print)"
        )
        database.executemany("INSERT INTO archives VALUES (?, ?, ?, ?, ?)", listed)
        database.execute("CREATE TABLE members (path TEXT PRIMARY KEY, archive, offset, size)")
    again = Pictures(source, old)
    again.index()
    assert again.find("doc/stored.png") == pictures.find("doc/stored.png")
    assert again.digest() == pictures.digest()


def folder_of(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_joined_file_equals_its_parts(tmp_path):
    data = random.Random(0).randbytes(10_000)
    paths = []
    for number, part in enumerate([data[:1], data[1:1], data[1:4_000], data[4_000:]]):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(part)
    with io.BufferedReader(JoinedFile(paths), 97) as joined:
        assert joined.read() == data
        for start, size in [(0, 2), (1, 5_000), (3_999, 2), (4_000, 1), (9_990, 100), (20_000, 5)]:
            joined.seek(start)
            assert joined.read(size) == data[start : start + size]
        assert joined.seek(-10, io.SEEK_END) == 9_990
        assert joined.read() == data[-10:]


@pytest.mark.parametrize("length", [300, 700, 1024, 2_000, 3_584])
def test_cut_tar_file_is_an_error(tmp_path, length):
    put(tmp_path / "s/a.tar", tar(["1.jpg", "2.jpg", "3.jpg"])[:length])
    with pytest.raises(ReleaseError, match=r"a\.tar.*(complete tar|cut off)"):
        Pictures(tmp_path / "s", tmp_path / "archives.sqlite").index()


def test_cut_zip_file_is_an_error(tmp_path, source):
    put(tmp_path / "s/a.zip", (source / "doc.zip").read_bytes()[:-30])
    with pytest.raises(
        ReleaseError, match=r"a\.zip: is not a complete zip file; download it again"
    ):
        Pictures(tmp_path / "s", tmp_path / "archives.sqlite").index()


def test_missing_part_and_compressed_archive_are_errors(tmp_path):
    for number in (0, 2):
        put(tmp_path / f"a/part_{number:02d}", b"x")
    with pytest.raises(
        ReleaseError, match="a part of an archive is missing; found part_00, part_02"
    ):
        find_archives(tmp_path)
    put(tmp_path / "b/images.tar.gz", b"x")
    with pytest.raises(ReleaseError, match=r"images\.tar\.gz: is compressed as a whole"):
        find_archives(tmp_path / "b")


def test_file_that_shrank_is_an_error(pictures, source):
    _, place = pictures.find("general/plain/19.jpg")
    data = (source / "general/plain.tar").read_bytes()
    (source / "general/plain.tar").write_bytes(data[: place.offset + 5])
    with pytest.raises(OSError, match=r"plain\.tar ends inside general/plain/19\.jpg"):
        pictures.read(place)
