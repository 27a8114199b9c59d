"""Pictures of the release in folders and archives. Their bytes are their names here."""

import contextlib
import io
import os
import pickle
import random
import sqlite3
import tarfile
import tracemalloc
import zipfile

import pytest

from pangea_jax.data.build import archives
from pangea_jax.data.build.archives import JoinedFile, Pictures, Place, find_archives
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


@pytest.mark.parametrize("hurt", [lambda data: b"null", lambda data: data[:5_000]])
def test_a_damaged_list_is_made_anew(source, pictures, tmp_path, hurt):
    place, file = pictures.find("doc/stored.png"), tmp_path / "archives.sqlite"
    file.write_bytes(hurt(file.read_bytes()))
    again = Pictures(source, file)
    again.index()
    assert again.find("doc/stored.png") == place


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


def make_zip(path, members, edit=lambda data: data):
    """A zip file of deflated members, changed by `edit`; its pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    path.write_bytes(edit(stream.getvalue()))
    pictures = Pictures(path.parent, path.parent.parent / "archives.sqlite")
    pictures.index()
    return pictures


def directory_with(number, offset, value):
    """Sets bytes of the n-th entry of a zip file's directory."""

    def edit(data):
        data, at = bytearray(data), -1
        for _ in range(number + 1):
            at = data.index(b"PK\1\2", at + 1)
        data[at + offset : at + offset + len(value)] = value
        return bytes(data)

    return edit


GOOD, OTHER = random.Random(1).randbytes(3_000), random.Random(2).randbytes(2_000)
TWO = {"a.png": GOOD, "b.png": OTHER}


@pytest.mark.parametrize("name", ["bomb.zip", "bomb.tar", "bomb.png"])
def test_a_bomb_is_not_inflated(tmp_path, name):
    """Half a gigabyte of zeros: deflated in a zip file, a hole in a tar file, a hole in a file."""
    size, path = 1 << 29, tmp_path / "s" / name
    path.parent.mkdir()
    if name.endswith(".zip"):
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("bomb.png", "w") as member,
        ):
            for _ in range(size >> 24):
                member.write(bytes(1 << 24))
    else:
        begin = b""
        if name.endswith(".tar"):
            info = tarfile.TarInfo("bomb.png")
            info.size = size
            begin = info.tobuf()
        path.write_bytes(begin)
        os.truncate(path, len(begin) + size + 1024)
    pictures = Pictures(tmp_path / "s", tmp_path / "archives.sqlite")
    pictures.index()
    tracemalloc.start()
    with pytest.raises(OSError, match=r"bomb\.png.*has more than 134,217,728 bytes"):
        pictures.read(pictures.find("bomb.png")[1])
    assert tracemalloc.get_traced_memory()[1] < 300 << 20
    tracemalloc.stop()


def test_a_high_ratio_is_a_bomb(tmp_path):
    pictures = make_zip(
        tmp_path / "s/a.zip", {"zeros.png": bytes(8 << 20), "small.png": bytes(999)}
    )
    with pytest.raises(
        OSError, match=r"zeros\.png in a\.zip inflates to 1,0\d\d times its 8,\d+ byte"
    ):
        pictures.read(pictures.find("zeros.png")[1])
    assert pictures.read(pictures.find("small.png")[1]) == bytes(999)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (directory_with(0, 24, b"\x01\0\0\0"), "not as large as"),  # the size
        (directory_with(0, 20, b"\x01\0\0\0"), "not as large as"),  # the compressed size
        (directory_with(0, 42, b"\xf0\xff\xff\x7f"), "not where"),  # the offset
        (directory_with(0, 42, b"\x07\0\0\0"), "not where"),
        (directory_with(0, 8, b"\x01\0"), "is encrypted"),
        (lambda data: data.replace(b"PK\3\4", b"PK\7\7", 1), "not where"),
        (lambda data: data[:6] + b"\x01" + data[7:], "is encrypted"),
        (lambda data: data[:35] + b"\xff" + data[36:], "invalid block type"),
    ],
)
def test_a_damaged_member_of_a_zip_file_is_named_and_others_are_read(tmp_path, edit, problem):
    pictures = make_zip(tmp_path / "s/a.zip", TWO, edit)
    assert pictures.read(pictures.find("b.png")[1]) == OTHER
    with pytest.raises(
        OSError, match=rf"a(\.png in a\.zip|\.zip is damaged at a\.png).*({problem})"
    ):
        pictures.read(pictures.find("a.png")[1])


def test_sizes_that_lie_at_both_places_are_found_while_inflating(tmp_path):
    def edit(data):
        size = len(OTHER).to_bytes(4, "little")
        return data.replace(size, (len(OTHER) - 1).to_bytes(4, "little"))

    pictures = make_zip(tmp_path / "s/a.zip", TWO, edit)
    with pytest.raises(OSError, match=r"damaged at b\.png: it does not inflate to 1,999 bytes"):
        pictures.read(pictures.find("b.png")[1])


def test_members_that_share_bytes_are_named(tmp_path):
    pictures = make_zip(
        tmp_path / "s/a.zip", {"a.png": GOOD, "b.png": GOOD}, directory_with(1, 42, b"\0" * 4)
    )
    assert pictures.read(pictures.find("a.png")[1]) == GOOD
    with pytest.raises(OSError, match=r"b\.png in a\.zip shares its bytes with another member"):
        pictures.read(pictures.find("b.png")[1])


@pytest.mark.parametrize("place", [2, 4, 10, 30, 46])
def test_a_damaged_directory_names_its_archive(tmp_path, place):
    def edit(data):
        at = data.index(b"PK\1\2") + place
        return data[:at] + b"\xff" * 8 + data[at + 8 :]

    with contextlib.suppress(OSError, RecordError, ReleaseError):
        pictures = make_zip(tmp_path / "s/a.zip", TWO, edit)
        found = pictures.find("a.png")
        assert found is None or pictures.read(found[1]) == GOOD


def test_a_member_without_a_name_is_passed_over(tmp_path):
    members = {"QQQQ": GOOD, "b.png": OTHER}
    pictures = make_zip(tmp_path / "s/a.zip", members, lambda data: data.replace(b"QQQQ", bytes(4)))
    assert pictures.read(pictures.find("b.png")[1]) == OTHER


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 1)
    with pytest.raises(ReleaseError, match=r"a\.zip: has more than 1 members"):
        make_zip(tmp_path / "s/a.zip", TWO)


def tar_header(type, size, name=b"x"):
    info = tarfile.TarInfo("x")
    info.type = type
    buffer = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    buffer[124:136] = (
        b"\x80" + size.to_bytes(11, "big")
        if size >= 0
        else b"\xff" + (256**11 + size).to_bytes(11, "big")
    )
    buffer[148:156] = b"        "
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    return bytes(buffer)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (tar_header(tarfile.GNUTYPE_LONGNAME, 1 << 31), "directory or name of 2,147,483,"),
        (tar_header(tarfile.XHDTYPE, 1 << 31), "directory or name of 2,147,483,"),
        (tar_header(tarfile.REGTYPE, -1024), "not a complete tar file"),
        (tar_header(tarfile.REGTYPE, 1 << 80), "not a complete tar file|cut off"),
        (tar_header(tarfile.GNUTYPE_LONGNAME, 0) * 5_000, "not a complete tar file|cut off"),
    ],
)
def test_a_tar_file_with_an_impossible_header_is_named(tmp_path, header, problem):
    put(tmp_path / "s/a.tar", header)
    os.truncate(tmp_path / "s/a.tar", len(header) + (1 << 32 if "name of" in problem else 4096))
    with pytest.raises(ReleaseError, match=rf"a\.tar.*({problem})"):
        Pictures(tmp_path / "s", tmp_path / "archives.sqlite").index()


@pytest.fixture
def linked(tmp_path):
    """A source with links to a file, to a folder and to an archive: within it and out of it."""
    put(tmp_path / "secret/0.png", b"secret")
    put(tmp_path / "s/real/0.png", b"mine")
    for name, target in {"secret": tmp_path / "secret", "inner": tmp_path / "s/real"}.items():
        (tmp_path / "s" / name).symlink_to(target)
        (tmp_path / "s" / f"{name}.png").symlink_to(target / "0.png")
    return tmp_path / "s"


def test_links_out_of_the_source_are_refused(linked, tmp_path):
    pictures = Pictures(linked, tmp_path / "archives.sqlite")
    pictures.index()
    for path in ("inner.png", "inner/0.png"):
        assert pictures.read(pictures.find(path)[1]) == b"mine"
    for path in ("secret.png", "secret/0.png", "./secret/0.png"):
        with pytest.raises(RecordError, match=r"outside of the source .*pass --follow_links"):
            pictures.find(path)
        with pytest.raises(OSError, match="out of the source"):
            pictures.read(Place("", path, 0, 6, 0))
    follows = Pictures(linked, tmp_path / "archives.sqlite", follow_links=True)
    assert follows.read(follows.find("secret.png")[1]) == b"secret"


def test_an_archive_that_is_a_link_out_of_the_source_is_refused(linked, tmp_path):
    put(tmp_path / "secret/a.tar", tar(["1.jpg"]))
    (linked / "a.tar").symlink_to(tmp_path / "secret/a.tar")
    with pytest.raises(ReleaseError, match=r"a\.tar: is a symbolic link out of the source"):
        Pictures(linked, tmp_path / "archives.sqlite").index()
    Pictures(linked, tmp_path / "archives.sqlite", follow_links=True).index()
    (tmp_path / "secret/a.tar").unlink()
    with pytest.raises(ReleaseError, match=r"a\.tar: is a link to nothing"):
        find_archives(linked)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_special_files_are_refused_at_once(tmp_path, make):
    (tmp_path / "s").mkdir()
    make(tmp_path / "s/0.png")
    pictures = Pictures(tmp_path / "s", tmp_path / "archives.sqlite", follow_links=True)
    pictures.index()
    with pytest.raises(RecordError, match="picture is not a regular file"):
        pictures.find("0.png")
    with pytest.raises(OSError, match="not a regular file"):
        pictures.read(Place("", "0.png", 0, 6, 0))
    for name in ("a.tar", "a.zip", "a.tar.part00"):
        make(tmp_path / "s" / name)
        with pytest.raises(ReleaseError, match=r"a\.\S+: is a (named pipe|device), not a regular"):
            pictures.index()
        (tmp_path / "s" / name).unlink()
