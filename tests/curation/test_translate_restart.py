"""Translation killed, and on two processes: the same results, and every reply paid for once."""

import json
import multiprocessing
import random
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("apache_beam", reason="apache-beam is in requirements-curation.txt")
pytest.importorskip("openai", reason="openai is in requirements-curation.txt")


from .translator import SHARES, english_records, make_config, run, translator

ROOT = Path(__file__).parents[2]
OPTIONS = ["--runner=DirectRunner"]


def _results(out):
    """Every file of the results, but what says how they came about."""
    names = ("records", "provenance", "dropped", "report.json", "report.md", "quality.jsonl")
    paths = [
        path
        for name in names
        for path in ((out / name).rglob("*") if (out / name).is_dir() else [out / name])
    ]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def test_two_processes_write_the_same_and_pay_for_nothing_twice(
    start_endpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the workers
    two = [*OPTIONS, "--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    endpoints = [start_endpoint(translator, shares=SHARES, seed=3) for _ in range(2)]
    # The same records twice: the two workers meet the same prompts.
    records = english_records() * 2
    for endpoint, options, name in zip(endpoints, (OPTIONS, two), ("one", "two"), strict=True):
        run(make_config(tmp_path, endpoint, records), tmp_path / name, options)
        assert set(endpoint.finished.values()) == {1}
    assert _results(tmp_path / "one") == _results(tmp_path / "two")
    assert endpoints[0].finished == endpoints[1].finished


def _stored(path):
    """Keys of the stored replies, and the calls that a killed process left under way."""
    if not path.is_file():
        return set(), set()
    with sqlite3.connect(path, timeout=60) as file:
        tables = {row[0] for row in file.execute("SELECT name FROM sqlite_master")}
        if "under_way" not in tables:
            return set(), set()
        keys = {row[0] for row in file.execute("SELECT key FROM replies")}
        return keys, set(file.execute("SELECT key, owner FROM under_way"))


def test_killed_ten_times_it_writes_the_same_and_asks_for_no_stored_reply_again(
    start_endpoint, tmp_path
):
    """What is guaranteed, and no more: what was stored is never asked for again. Only a reply that was on its
    way when the process died is, since nobody has it; there are no more of these than calls at once."""
    whole = start_endpoint(translator, shares=SHARES, seed=3)
    config = make_config(tmp_path, whole)
    config.quality.sample = 40
    run(config, tmp_path / "whole", OPTIONS)

    def unhurried(request, kind):
        time.sleep(0.01)
        return translator(request, kind)

    endpoint = start_endpoint(unhurried, shares=SHARES, seed=3)
    config.llm.base_url, out = endpoint.url, tmp_path / "killed"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["apache_beam", "openai", "pangea_jax.curation.translate"])
    chance = random.Random(0)
    finished, paid_again, lost = Counter(), Counter(), set()
    kills = 0
    while True:
        process = context.Process(target=run, args=(config, out, OPTIONS))
        process.start()
        if kills < 10:
            _wait_for_a_moment(process, endpoint, chance, kills)
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -9, "it failed by itself"
        kills += 1
        endpoint.wait_until_idle()
        stored, under_way = _stored(out / "work" / "replies.sqlite")
        assert len(under_way) <= config.llm.concurrency
        lost |= under_way
        # Finished in this run, but the process died before it was stored.
        unheard = {key for key in endpoint.finished - finished if key not in stored}
        assert unheard <= {key for key, _ in under_way}
        paid_again.update(unheard)
        assert all(endpoint.finished[key] == 1 + paid_again[key] for key in stored)
        finished = endpoint.finished.copy()
    assert kills == 10
    assert _results(out) == _results(tmp_path / "whole")
    assert set(endpoint.finished) == set(whole.finished)
    assert {k: n - paid_again[k] for k, n in endpoint.finished.items()} == dict(whole.finished)
    usage = [
        json.loads((folder / "usage.json").read_text()) for folder in (out, tmp_path / "whole")
    ]
    calls = [{k: row["calls"] for k, row in u.items() if row["calls"]} for u in usage]
    assert calls[0] == calls[1]
    assert sum(row["lost"] for row in usage[0].values()) == len(lost) > 0


def _wait_for_a_moment(process, endpoint, chance, kills):
    """Some replies later and a moment more; the first times perhaps before the first reply."""
    end = time.monotonic() + (chance.uniform(0.02, 0.5) if kills < 3 else 60.0)
    wanted = endpoint.finished.total() + chance.randint(1, 6)
    while endpoint.finished.total() < wanted and time.monotonic() < end and process.is_alive():
        time.sleep(0.002)
    process.join(chance.uniform(0.0, 0.02))
