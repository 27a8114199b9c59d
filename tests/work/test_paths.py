"""One kind of path for disks and buckets, and what a bucket's errors say."""

import importlib.util
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pangea_jax.work import atomic, paths, untrusted

ROOT = Path(__file__).parents[2]


def test_a_local_folder_stays_what_it_was(tmp_path):
    for name in ("runs/a", "/data/a", "C:x", "a:b", str(tmp_path)):
        assert paths.path(name) == Path(name) and type(paths.path(name)) is type(Path())
    assert paths.path(tmp_path) is tmp_path
    assert paths.children(tmp_path / "none") == set() and paths.sizes(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hdfs://a/b", "hdfs:// is not supported; give a local folder, or an address of gs://"),
        ("gs:/bucket/run", "names no bucket; write gs://BUCKET/FOLDER"),
        ("gs:///run", "names no bucket"),
    ],
)
def test_a_wrong_address_is_refused(name, said):
    with pytest.raises(paths.PathError, match=said):
        paths.path(name)


def test_a_missing_library_names_the_file_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    paths._prepare.cache_clear()
    with pytest.raises(paths.PathError, match=r"pip install -r requirements-gcs\.txt"):
        paths.path("gs://bucket/run")
    assert (ROOT / paths.REQUIREMENTS).is_file()


def test_no_library_of_a_cloud_is_imported_for_a_disk():
    program = (
        "import sys; from pangea_jax.work import atomic, mirror, paths, restart\n"
        "paths.path('runs/a')\n"
        "print([m for m in ('fsspec', 'gcsfs', 'google.cloud', 'aiohttp', 'etils') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == "[]\n", found.stderr


def folder(bucket, name):
    return paths.path(f"{bucket.url}/{name}")


def test_files_are_written_and_read(bucket):
    top = folder(bucket, "files")
    atomic.write_json(top / "a/plan.json", {"x": [1, "ü"]})
    assert atomic.read_json(top / "a/plan.json") == {"x": [1, "ü"]}
    with atomic.writing(top / "b.bin") as local:
        local.write_bytes(b"0123456789")
    assert paths.read_range(top / "b.bin", 3, 6) == b"345"
    assert paths.read_range(top / "b.bin", 8, 99) == b"89"
    assert paths.tail(top / "b.bin", 4) == b"6789" and paths.tail(top / "none", 4) == b""
    assert untrusted.read_regular(top / "b.bin", 10) == b"0123456789"
    with pytest.raises(untrusted.TooLarge):
        untrusted.read_regular(top / "b.bin", 9)
    assert paths.children(top) == {"a", "b.bin"}
    assert paths.sizes(top) == {"a/plan.json": 37, "b.bin": 10}
    with paths.nearby(top / "b.bin") as local:
        assert local.read_bytes() == b"0123456789" and local.name == "b.bin"
    assert not local.exists()
    bucket.forget()
    assert paths.read_bytes(top / "b.bin") == b"0123456789"
    assert bucket.requests == [("GET", "files/b.bin")]


def test_a_write_that_fails_leaves_what_was_there(bucket):
    file = folder(bucket, "whole") / "a.txt"
    atomic.write_bytes(file, b"before")

    def fail():
        with atomic.writing(file) as local:
            local.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert paths.read_bytes(file) == b"before"


def test_a_folder_is_moved_with_the_file_that_marks_it_last(bucket):
    source, target = folder(bucket, "move/new.partial"), folder(bucket, "move/new")
    for name in ("config.json", "z.bin", "params/a"):
        atomic.write_bytes(source / name, name.encode())
    bucket.forget()
    paths.move_tree(source, target, last="config.json")
    assert paths.sizes(target) == {"config.json": 11, "params/a": 8, "z.bin": 5}
    assert paths.sizes(source) == {}
    copies = [name for method, name in bucket.requests if method == "POST" and "rewrite" in name]
    assert "config.json" in copies[-1]


@pytest.mark.parametrize("code", [503, 429, 500, 0])
def test_what_passes_is_tried_again(bucket, code):
    file = folder(bucket, f"again{code}") / "a.txt"
    bucket.fail(code, 2)
    atomic.write_bytes(file, b"text")
    assert not bucket.left
    bucket.fail(code, 2)
    assert paths.read_bytes(file) == b"text"
    assert not bucket.left


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (401, "refuses access .*; the account needs roles/storage.objectUser"),
        (403, "refuses access .*; the account needs roles/storage.objectUser"),
        (404, "there is no such bucket or object"),
    ],
)
def test_what_does_not_pass_is_named(bucket, code, said):
    bucket.fail(code, 9)
    with pytest.raises(Exception) as raised:  # noqa: PT011  # the types are the library's
        atomic.write_bytes(folder(bucket, "named") / "a.txt", b"text")
    fault = paths.explain(raised.value)
    assert not fault.passes and "\n" not in fault.sentence
    assert re.search(said, fault.sentence)
    assert bucket.left == 8


def test_a_bucket_that_is_not_there_is_named(bucket):
    del bucket
    with pytest.raises(FileNotFoundError) as raised:
        atomic.write_bytes(paths.path("gs://no-such-bucket/a.txt"), b"text")
    assert "there is no such bucket or object" in paths.explain(raised.value).sentence


def test_other_errors_are_not_explained(tmp_path):
    for error in (ValueError("gs is 3"), OSError(5, "I/O error"), KeyError("503")):
        assert paths.explain(error) is None
    with pytest.raises(FileNotFoundError) as raised:
        paths.read_bytes(tmp_path / "none")
    assert paths.explain(raised.value) is None


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/a/b"), "the disk is full"),
        (OSError(122, "Disk quota exceeded", "/a/b"), "the disk is full"),
        (ValueError('RESOURCE_EXHAUSTED: Failed writing: "/a/b": No space left'), ""),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device [28]"), "the disk is full"),
        (sqlite3.OperationalError("database or disk is full"), "the disk is full"),
        (OSError(30, "Read-only file system", "/a/b"), "the disk is read-only"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "the disk is read-only"),
    ],
)
def test_a_disk_that_takes_nothing_is_explained(error, says):
    said = paths.say(error)
    assert said.startswith(says) and str(error) in said
    assert bool(paths.explain(error)) == bool(says)
    if says:
        assert not paths.explain(error).passes and said.endswith(
            ("command again", "another folder")
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux'")
def test_a_full_disk_is_explained():
    with pytest.raises(OSError, match="No space") as raised, open("/dev/full", "w") as file:
        file.write("text")
    assert paths.say(raised.value).startswith("the disk is full ([Errno 28]")
