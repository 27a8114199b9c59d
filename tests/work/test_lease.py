"""One process at a time writes a folder in a bucket, also after one was killed."""

import json
import threading
import time

import pytest

from pangea_jax.work import lease, paths, restart
from pangea_jax.work.atomic import write_bytes


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    for name, seconds in {"RENEWS": 0.3, "EXPIRES": 2.5, "LOOKS": 0.1}.items():
        monkeypatch.setattr(lease, name, seconds)


def lock(bucket, name):
    return paths.path(f"{bucket.url}/{name}/lock")


def holder(**changes):
    return json.dumps(lease._identity() | {"token": "theirs"} | changes).encode()


def test_a_second_process_is_refused_and_changes_nothing(bucket):
    path = lock(bucket, "two")
    with restart.claim(path):
        before = paths.read_bytes(path)
        with pytest.raises(
            restart.WorkError,
            match=r"another process \(.*, process \d+\) is writing gs://pangea/two",
        ):
            restart.claim(path).__enter__()
        assert paths.read_bytes(path) == before
        waited = []
        late = threading.Thread(target=lambda: _wait(path, waited), daemon=True)
        late.start()
        while not waited:
            time.sleep(0.05)
        time.sleep(1)
        assert waited == ["waits"]
    late.join(30)
    assert waited == ["waits", "holds"]
    assert paths.children(path.parent) == set()


def _wait(path, waited):
    with restart.claim(path, on_wait=lambda: waited.append("waits")):
        waited.append("holds")


def test_a_killed_holder_of_this_machine_is_followed_at_once(bucket):
    path = lock(bucket, "killed")
    write_bytes(path, holder(process=2**22 + 1))
    begin = time.monotonic()
    with restart.claim(path):
        assert time.monotonic() - begin < lease.EXPIRES


def test_a_silent_holder_of_another_machine_is_followed_after_a_while(bucket):
    path = lock(bucket, "silent")
    write_bytes(path, holder(machine="another", process=1))
    begin = time.monotonic()
    with restart.claim(path):
        assert time.monotonic() - begin >= lease.EXPIRES
        assert json.loads(paths.read_bytes(path))["token"] != "theirs"


def test_a_damaged_claim_is_followed_after_a_while(bucket):
    path = lock(bucket, "damaged")
    write_bytes(path, b"\xff")
    with restart.claim(path):
        assert json.loads(paths.read_bytes(path))["process"]


def test_a_holder_that_lost_its_claim_is_told_and_leaves_the_new_one(bucket):
    path, lost = lock(bucket, "lost"), []
    with lease.hold(path, on_wait=None, on_loss=lost.append):
        write_bytes(path, holder(machine="another"))
        deadline = time.monotonic() + 30
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
    assert lost == ["another process has taken gs://pangea/lost; this one stops"]
    assert json.loads(paths.read_bytes(path))["token"] == "theirs"


@pytest.mark.parametrize("code", [503, 0])
def test_a_claim_survives_faults(bucket, code):
    path, lost = lock(bucket, f"faults{code}"), []
    bucket.fail(code, 2, name="lock")
    with lease.hold(path, on_wait=None, on_loss=lost.append):
        bucket.fail(code, 2, name="lock")
        deadline = time.monotonic() + 20
        while bucket.left and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not bucket.left
    assert not lost
    assert paths.children(path.parent) == set()


def test_only_buckets_of_google_can_be_claimed(monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setattr(paths, "_prepare", lambda scheme: None)
    with pytest.raises(restart.WorkError, match="cannot be claimed, so nothing is written there"):
        restart.claim(paths.path("s3://bucket/run/lock")).__enter__()
