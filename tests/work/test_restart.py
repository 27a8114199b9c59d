"""A folder belongs to one process and one plan."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pangea_jax.work import restart
from pangea_jax.work.atomic import partial_path, write_json

_HOLD = "import sys; from pathlib import Path; from pangea_jax.work import restart\n"
_HOLD += "with restart.claim(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_claim_keeps_others_out_until_its_process_ends(tmp_path):
    lock = tmp_path / "work/lock"
    command = [sys.executable, "-c", _HOLD, str(lock)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(restart.WorkError, match=r"another process is writing .*work; wait"):
            restart.claim(lock).__enter__()
        waited = []
        with restart.claim(lock, on_wait=lambda: (waited.append(1), holder.kill())):
            assert waited == [1]
    finally:
        holder.kill()
        holder.communicate()
    with restart.claim(lock, on_wait=lambda: waited.append(2)):
        assert waited == [1]


def test_a_folder_keeps_its_plan(tmp_path):
    path = tmp_path / "work/plan.json"
    for _ in range(2):
        restart.settle(path, {"sizes": (1, 2), "source": tmp_path}, tmp_path)
    with pytest.raises(
        restart.WorkError, match=r"settings \(sizes is \[1, 2\] there and \[3\] here"
    ):
        restart.settle(path, {"sizes": [3], "source": tmp_path}, tmp_path)


def test_free_keys_may_differ():
    theirs, ours = {"a": {"x": 1}, "b": 2}, {"a": {"x": 3}, "b": 4}
    said = {"holds": "a run of another config", "flag": "--workdir"}
    with pytest.raises(restart.WorkError, match=r"config \(b is 2 there and 4 here\); .*--workdir"):
        restart.compare(theirs, ours, "runs/a", free=re.compile(r"a\..*"), **said)
    with pytest.raises(restart.WorkError, match=r"or remove that one; or start again$"):
        restart.compare(theirs, ours, "runs/a", more="or start again")
    assert restart.compare(theirs, ours, "runs/a", free=re.compile(".*")).keys() == {"a.x", "b"}


def test_half_written_files_are_removed(tmp_path):
    whole = tmp_path / "a/b.json"
    write_json(whole, {})
    partial_path(whole).write_bytes(b"half")
    partial_path(tmp_path / "c").write_bytes(b"half")
    restart.remove_partial(tmp_path, "*.partial")
    assert len(list(tmp_path.rglob("*.partial"))) == 1
    restart.remove_partial(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [whole]


@pytest.mark.parametrize(
    "path", ["gs://bucket/run", Path("gs://bucket/run"), "s3://b/r", "hdfs://n/r", "file:///tmp/x"]
)
def test_an_address_is_no_folder(path):
    with pytest.raises(restart.WorkError, match=r"--out is .*:// is not supported here"):
        restart.check_local(path, "--out")


@pytest.mark.parametrize("path", [None, "runs/a", "/tmp/gs:/x", "./gs:/x", "a:b/c", "runs/a=1:b"])
def test_a_folder_is_no_address(path):
    restart.check_local(path, "--out")


def test_a_claim_makes_no_folder_of_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(restart.WorkError, match="gs://"), restart.claim(Path("gs://b/run/lock")):
        pass
    assert not list(tmp_path.iterdir())
