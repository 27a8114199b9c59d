"""An evaluation in a bucket gives the files of one on a disk, also after a kill."""

import json

import pytest

from eval import run
from pangea_jax.work import mirror, paths

# Reports name their folder, and results the time.
SAME = ("responses/mgsm_en.jsonl", "samples/mgsm_en.jsonl", "report.md", "languages.png")


@pytest.fixture
def flags(data_dir, tmp_path, write_jsonl):
    rows = [
        {"task": "mgsm_en", "doc_id": str(i), "response": f"The answer is {i + (i == 3)}."}
        for i in range(30)
    ]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    return data_dir, file


def test_an_evaluation_is_the_same_there(bucket, flags, tmp_path, capsys):
    data_dir, file = flags
    top = paths.path(f"{bucket.url}/eval")
    paths.store(top).put(f"{data_dir}/mgsm/", f"{top}/data/mgsm/", recursive=True)
    paths.store(top).put_file(str(file), f"{top}/r.jsonl")
    words = ["--tasks=mgsm_en", f"--responses={file}", f"--data_dir={data_dir}"]
    assert run.main([*words, f"--output_path={tmp_path / 'out'}"]) == 0
    words = ["--tasks=mgsm_en", f"--responses={top}/r.jsonl", f"--data_dir={top}/data"]
    assert run.main([*words, f"--output_path={top}/out"]) == 0
    assert paths.sizes(top / "out").keys() == paths.sizes(tmp_path / "out").keys()
    for name in SAME:
        assert paths.read_bytes(top / "out" / name) == (tmp_path / "out" / name).read_bytes(), name
    ours, theirs = (
        json.loads(paths.read_bytes(f / "results.json"))["tasks"]
        for f in (top / "out", tmp_path / "out")
    )
    assert ours == theirs
    assert run.main(["rescore", f"{top}/out"]) == 0
    assert "rescored.jsonl" in paths.children(top / "out")
    assert run.main(["report", f"{top}/out", f"--output_path={top}/report"]) == 0
    assert "report.html" in paths.children(top / "report")
    capsys.readouterr()


class Killed(BaseException):
    pass


def test_a_killed_evaluation_asks_only_what_is_left(bucket, flags, monkeypatch):
    data_dir, _ = flags
    out, asked = f"{bucket.url}/killed", []

    class Model:
        name = "counting"

        def __init__(self, lives):
            self.lives = lives

        def generate(self, requests):
            for request in requests:
                if not self.lives:
                    raise Killed
                self.lives -= 1
                asked.append(request.document.id)
                yield request, "The answer is 1."

    monkeypatch.setattr(mirror, "EVERY", 0.1)
    words = ["--tasks=mgsm_en", "--model=x", f"--data_dir={data_dir}", f"--output_path={out}"]
    for lives in (10, 99):
        monkeypatch.setattr(run, "_open_model", lambda args, lives=lives: Model(lives))
        try:
            assert run.main(words) == 0
        except Killed:
            assert lives == 10
    assert sorted(asked, key=int) == [str(i) for i in range(30)]
    log = paths.path(out) / "responses/mgsm_en.jsonl"
    assert len(paths.read_bytes(log).splitlines()) == 30
