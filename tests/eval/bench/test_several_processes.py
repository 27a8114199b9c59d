"""Two processes of four devices answer as one does, also if one of them is killed on the way."""

import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest
from rich.console import Console

from eval.bench import responses, tasks
from tests.eval.bench.conftest import write_little
from tests.eval.bench.test_run import Counting

ROOT = Path(__file__).parents[3]
TASKS = "mgsm_en,mgsm_sw,xgqa_de,xstorycloze_sw"
ASKED = 30 + 30 + 9 + 4


@pytest.fixture(scope="module")
def flags(tmp_path_factory, checkpoint, write_jsonl):
    """The flags of an evaluation of a random model, but for the output folder."""
    folder = write_little(tmp_path_factory.mktemp("little"), write_jsonl)
    asked = f"--tasks={TASKS}", "--gen_kwargs=max_new_tokens=8", "--batch_size=4"
    return *asked, f"--model={checkpoint}", "--name=random", f"--data_dir={folder}"


def start(flags, output, count):
    """Starts a job of so many processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    if count > 1:
        environment |= {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "eval/run.py", *flags, f"--output_path={output}"],
            cwd=ROOT,
            env=environment | ({"PROCESS_ID": str(index)} if count > 1 else {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for index in range(count)
    ]


def end(processes):
    """What the processes printed, if all ended well."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(said), "\n".join(said)
    return said


def contents(output):
    """The files of an evaluation by name."""
    files = (path for path in output.rglob("*") if path.is_file())
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    end(start(flags, output, 1))
    return contents(output)


def test_every_byte_is_the_same(flags, alone, tmp_path):
    said = end(start(flags, tmp_path, 2))
    assert contents(tmp_path) == alone
    assert "report:" in said[0] and "report:" not in said[1]
    rows = [line for name in alone if "responses/" in name for line in alone[name].splitlines()]
    assert len(rows) == ASKED


def test_a_killed_process_costs_no_answer(flags, alone, tmp_path):
    processes = start(flags, tmp_path, 2)
    parts = tmp_path / "responses"
    deadline = time.monotonic() + 300
    while not (written := list(parts.glob("process_1/*.jsonl"))):
        assert processes[1].poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    time.sleep(0.5)
    processes[0].kill()  # a launcher ends the others
    for process in processes:
        process.communicate()
    log = responses.ResponseLog(tmp_path)
    kept = sum(len(log.read(name)) for name in TASKS.split(","))
    assert written and 0 < kept < ASKED
    # One process fewer goes on.
    said, *_ = end(start(flags, tmp_path, 1))
    assert f"{kept} of {ASKED} responses were already there" in said
    found, wanted = contents(tmp_path), alone
    assert found.keys() == wanted.keys()
    texts = [name for name in wanted if name.startswith("responses/") and "story" not in name]
    for name in (*texts, "results.json", "report.md"):
        assert found[name] == wanted[name], name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parcels_do_not_depend_on_the_processes(data_dir, count, monkeypatch):
    monkeypatch.setattr(responses, "_LEAST", 4)
    names = TASKS.split(",")
    requests, _ = responses.make_requests(tasks.select(names), data_dir, profile="fixed")
    parts = responses.parcels(requests)
    assert sorted(r.key for part in parts for r in part) == sorted(r.key for r in requests)
    assert len(parts) > 12
    for part in parts:
        assert len({request.generation for request in part}) == 1
    pictures = [{r.images for r in part if r.images} for part in parts]
    assert sum(map(len, pictures)) == 3  # no two parcels ask about one picture
    shares = [responses.share(parts, responses.Crew(i, count)) for i in range(count)]
    assert sorted(id(part) for own in shares for part in own) == sorted(map(id, parts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def crew_of_threads(count):
    barrier, said = threading.Barrier(count), [None] * count

    def gather(index, value):
        said[index] = value
        barrier.wait()
        found = list(said)
        barrier.wait()
        return found

    return [responses.Crew(i, count, functools.partial(gather, i)) for i in range(count)]


def test_what_only_one_process_sees_is_not_asked_again(data_dir, tmp_path, monkeypatch):
    """On machines without a common disk, each process knows its own responses; together they know all."""
    monkeypatch.setattr(responses, "_LEAST", 4)
    requests, _ = responses.make_requests(tasks.select(["mgsm_en"]), data_dir, profile="fixed")
    models = [Counting(), Counting()]

    def work(model, crew):
        log = responses.ResponseLog(tmp_path / crew.part, crew.part)
        for request in requests[10 * crew.index : 10 * crew.index + 10]:
            log.append(request, "5", model.name)
        responses.run(model, requests, log, console=Console(quiet=True), crew=crew)

    with futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(work, models, crew_of_threads(2)))
    asked = [key for model in models for key in model.asked]
    assert sorted(asked) == sorted(r.key for r in requests[20:])
    rows = responses.ResponseLog(tmp_path / "process_0").read("mgsm_en")
    assert sorted(row["doc_id"] for row in rows) == sorted(r.document.id for r in requests)
    assert [row["resps"] == [["5"]] for row in rows].count(True) == 20
