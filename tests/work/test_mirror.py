"""Logs in a bucket: what is appended, replaced or removed on the disk is so there."""

import time

import pytest

from pangea_jax.work import mirror, paths
from pangea_jax.work.atomic import write_bytes


def target(bucket, name):
    return paths.path(f"{bucket.url}/{name}")


def content(folder):
    return {name: paths.read_bytes(folder / name) for name in paths.sizes(folder)}


def test_a_folder_on_a_disk_is_used_itself(tmp_path):
    with mirror.mirrored(tmp_path) as files:
        assert files.folder == tmp_path
        files.sync()


def test_files_are_brought_changed_and_removed(bucket):
    folder = target(bucket, "changes")
    for name in ("log.txt", "sub/old.txt", "other.txt"):
        write_bytes(folder / name, b"before\n")
    with mirror.mirrored(folder, bring=("log.txt", "sub/old.txt", "none.txt")) as files:
        assert not (files.folder / "other.txt").exists()
        with (files.folder / "log.txt").open("ab") as log:
            log.write(b"after\n")
        (files.folder / "sub/old.txt").unlink()
        (files.folder / "half.partial").write_bytes(b"x")
        (files.folder / "sub/new.txt").write_bytes(b"new")
        files.sync()
        assert content(folder) == {
            "log.txt": b"before\nafter\n",
            "other.txt": b"before\n",
            "sub/new.txt": b"new",
        }
        bucket.forget()
        files.sync()
        assert not bucket.requests
        (files.folder / "last.txt").write_bytes(b"last")
    assert content(folder)["last.txt"] == b"last"


def test_only_the_new_part_of_a_long_log_is_sent(bucket, monkeypatch):
    monkeypatch.setattr(mirror, "_APPENDED_FROM", 1000)
    folder = target(bucket, "long")
    with mirror.mirrored(folder) as files:
        log = files.folder / "metrics.jsonl"
        log.write_bytes(b"a" * 5000)
        files.sync()
        for letter in b"bcd":
            with log.open("ab") as file:
                file.write(bytes([letter]) * 700)
            bucket.forget()
            files.sync()
            assert ("POST", "long/metrics.jsonl.partial") in bucket.requests
            assert ("POST", "long/metrics.jsonl") in bucket.requests  # the two are joined
        assert content(folder) == {"metrics.jsonl": log.read_bytes()}
        log.write_bytes(b"z" * 9000)  # a longer file that does not begin with the same bytes
        files.sync()
        assert content(folder) == {"metrics.jsonl": b"z" * 9000}
        write_bytes(folder / "metrics.jsonl", b"someone else's")
        with log.open("ab") as file:
            file.write(b"y")
    assert content(folder) == {"metrics.jsonl": b"z" * 9000 + b"y"}


def test_new_lines_arrive_without_being_asked_for(bucket, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY", 0.2)
    folder = target(bucket, "timer")
    with mirror.mirrored(folder) as files:
        (files.folder / "log.txt").write_bytes(b"line\n")
        deadline = time.monotonic() + 30
        while paths.tail(folder / "log.txt", 9) != b"line\n":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_an_error_of_the_program_does_not_lose_its_log(bucket):
    folder = target(bucket, "error")

    def fail():
        with mirror.mirrored(folder) as files:
            (files.folder / "log.txt").write_bytes(b"why\n")
            raise KeyError("the reason")

    with pytest.raises(KeyError, match="the reason"):
        fail()
    assert content(folder) == {"log.txt": b"why\n"}


def test_a_bucket_that_refuses_the_last_copy_is_an_error(bucket):
    def fail():
        with mirror.mirrored(target(bucket, "refused")) as files:
            (files.folder / "log.txt").write_bytes(b"why\n")
            bucket.fail(403, 9)

    with pytest.raises(OSError, match="Forbidden") as raised:
        fail()
    assert "refuses access" in paths.explain(raised.value).sentence
