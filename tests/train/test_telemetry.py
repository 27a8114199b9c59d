"""Telemetry: the records of a resumed run equal those of an uninterrupted one, and logs are plain text."""

import io
import json
import struct
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pangea_jax.train import telemetry
from pangea_jax.train.telemetry import Profiler, Speed, StepTimer, Telemetry, Window


def _run(workdir, steps, total=20, **kwargs):
    console = Console(file=io.StringIO(), width=200)
    with Telemetry(workdir, total, console=console, **kwargs) as records:
        for step in steps:
            records.log(step, {"loss": 5 - step / 10, "tokens_per_second": 1000.0})
    return console.file.getvalue()


def _lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("time")
    return lines


def _events(workdir):
    """Events of all files in the order of writing, read as TFRecords."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    _run(tmp_path / "whole", range(20))
    _run(tmp_path / "killed", range(13))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "los')
    _run(tmp_path / "killed", range(10, 20), start_step=10)
    assert _lines(tmp_path / "killed") == _lines(tmp_path / "whole")
    assert len(_lines(tmp_path / "whole")) == 20


def test_a_foreign_metrics_file_is_named_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\nhello\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*hello"):
        Telemetry(tmp_path, 5, start_step=1)
    assert "hello" in path.read_text()


def test_scalars_can_be_read_back_from_the_event_files(tmp_path):
    _run(tmp_path, range(3))
    values = {
        (event.step, value.tag): value.simple_value
        for event in _events(tmp_path)
        for value in event.summary.value
    }
    assert {key[1] for key in values} == {"loss", "tokens_per_second"}
    assert [values[step, "loss"] for step in range(3)] == pytest.approx([5.0, 4.9, 4.8])


def test_resume_tells_tensorboard_which_steps_are_void(tmp_path):
    _run(tmp_path, range(8))
    first = len(_events(tmp_path))
    _run(tmp_path, range(5, 8), start_step=5)
    starts = [e for e in _events(tmp_path)[first:] if e.session_log.status == SessionLog.START]
    assert [event.step for event in starts] == [5]


def test_values_json_does_not_know_are_null(tmp_path):
    with Telemetry(tmp_path, 2, console=Console(file=io.StringIO())) as records:
        records.log(0, {"loss": float("nan"), "grad_norm": float("inf")})
    assert _lines(tmp_path) == [{"step": 0, "loss": None, "grad_norm": None}]


def test_a_log_gets_a_dozen_plain_lines(tmp_path):
    text = _run(tmp_path, range(400), total=400)
    lines = text.splitlines()
    assert 10 <= len(lines) <= 12
    assert all(character.isprintable() for line in lines for character in line)
    assert lines[0].startswith("step 1/400") and "loss 5.000" in lines[0]
    assert lines[-1].startswith("step 400/400 (100%)") and "1,000 tokens/s" in lines[-1]


def test_slow_steps_have_digits(tmp_path):
    """A step that takes minutes, a loss near 0 and a tiny MFU are not shown as 0."""
    console = Console(file=io.StringIO(), width=200)
    slow = {"loss": 0.00123, "validation/loss": 0.4, "tokens_per_second": 7.66, "mfu": 0.00042}
    with Telemetry(tmp_path, 2, console=console) as records:
        records.log(0, slow | {"examples_per_second": 0.4207})
        records.log(1, slow | {"examples_per_second": 0.00512})
    first, second = console.file.getvalue().splitlines()
    assert "loss 0.00123  validation 0.400  7.7 tokens/s  0.42 examples/s  MFU 0.042%" in first
    assert "0.0051 examples/s" in second


@pytest.mark.parametrize("terminal", [False, True])
def test_the_time_left_counts_steps_after_the_first_line(tmp_path, monkeypatch, terminal):
    """The first step compiles for ten minutes; then a step takes 100 s, longer than rich looks back."""
    now = [1000.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
    with Telemetry(tmp_path, 15, start_step=5, console=console) as records:
        for step, seconds in enumerate((600, 100, 100), 5):
            now[0] += seconds
            records.log(step, {"loss": 2.0})
        records._display.stop()  # the live line is drawn a last time
        text = console.file.getvalue()
    assert "left 0:11:40" in text  # seven steps of 100 s
    assert "left 1:" not in text
    if not terminal:
        assert text.splitlines()[0].endswith("elapsed 0:10:00")


def test_a_terminal_gets_one_live_line(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    with Telemetry(tmp_path, 4, console=console) as records:
        for step in range(4):
            records.log(step, {"loss": 2.5, "examples_per_second": 700})
        records.print("checkpoint [4] saved")
    text = console.file.getvalue()
    assert "4/4" in text and "loss 2.500" in text and "700 examples/s" in text
    assert "checkpoint [4] saved" in text and "\x1b[" in text


def test_an_interrupt_loses_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        Telemetry(tmp_path, 4, console=Console(file=io.StringIO())) as records,
    ):
        records.log(0, {"loss": 3.0})
        raise KeyboardInterrupt
    assert _lines(tmp_path) == [{"step": 0, "loss": 3.0}]
    assert any(event.summary.value for event in _events(tmp_path))


def test_other_processes_write_and_print_nothing(tmp_path):
    workdir = tmp_path / "run"
    assert _run(workdir, range(5), is_main=False) == ""
    assert not workdir.exists()


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

        def run(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(telemetry.time, "perf_counter", clock)
    return clock


def test_phases_do_not_overlap_and_add_up(clock):
    timer = StepTimer()
    clock.run(1)
    with timer.data():
        clock.run(2)
    with timer.step():
        clock.run(4)
        with timer.phase("compile"):
            clock.run(8)
        clock.run(1)
    assert timer.seconds == {"other": 1, "data": 2, "train step": 5, "compile": 8}
    summary = timer.summary()
    assert list(summary) == ["compile", "train step", "data", "other", "total"]
    assert summary["total"] == {"seconds": 16, "share": 1.0}
    assert sum(row["share"] for row in summary.values()) == pytest.approx(2.0)
    assert summary["compile"]["share"] == 0.5


def test_the_clock_goes_on_after_a_resume_and_counts_a_failed_phase(clock):
    timer = StepTimer(previous={"train step": 10.0, "other": 1.0})
    with pytest.raises(RuntimeError), timer.step():
        clock.run(3)
        raise RuntimeError
    assert timer.seconds == {"train step": 13, "other": 1}


STEP = {"loss": 1.0, "accuracy": 0.5, "grad_norm": 3.0, "grad_norm/vision": 1.0, "skipped": 0.0}
STEP |= {"target_tokens": 10.0, "tokens": 600.0, "examples": 8.0}


def test_a_window_weighs_by_trained_tokens_and_leaves_out_skipped_steps():
    window = Window()
    window.add(STEP)
    window.add(STEP | {"loss": 4.0, "target_tokens": 30.0, "grad_norm": 5.0, "loss_spikes": 1.0})
    window.add(STEP | {"loss": float("nan"), "grad_norm": float("inf"), "skipped": 1.0})
    again = Window()
    again.set_state(json.loads(json.dumps(window.get_state())))
    for one in (window, again):
        assert one.flush() == {
            "loss": (1 * 10 + 4 * 30) / 40,
            "accuracy": 0.5,
            "grad_norm": 4.0,
            "grad_norm/vision": 1.0,
            "skipped_steps": 1.0,
            "loss_spikes": 1.0,
        }
    window.add(STEP | {"skipped": 1.0})
    values = window.flush()
    assert values["loss"] != values["loss"] and values["grad_norm"] != values["grad_norm"]
    assert values["skipped_steps"] == 1


def test_speed_is_of_steps_and_waiting_for_data_alone(clock):
    timer = StepTimer({"train step": 100.0})
    speed = Speed(timer, flops_per_step=6e12, peak_flops=4e12)
    with timer.phase("compile"):
        clock.run(50)
    assert speed.flush().keys() <= {"device_memory_gib"}  # no step has been timed
    for _ in range(4):
        with timer.data():
            clock.run(0.5)
        with timer.step():
            clock.run(1.5)
        speed.add(STEP)
        with timer.phase("checkpoint"):
            clock.run(7)
    values = speed.flush()
    assert values["seconds_per_step"] == 2
    assert values["tokens_per_second"] == 300
    assert values["examples_per_second"] == 4
    assert values["data_wait"] == 0.25
    assert values["mfu"] == 6 / (2 * 4)
    assert "goodput" not in values
    with timer.step():
        clock.run(3)
    speed.add(STEP)
    assert speed.flush()["tokens_per_second"] == 200
    assert "mfu" not in Speed(timer, flops_per_step=6e12).flush()


def test_goodput_counts_what_was_lost_between_starts(clock, monkeypatch, tmp_path):
    monkeypatch.setattr(telemetry.time, "time", clock)
    assert telemetry.record_start(tmp_path, 0) == 100
    clock.run(1000)  # 600 of them are in steps that a checkpoint holds; the others are lost
    started = telemetry.record_start(tmp_path, 60)
    timer = StepTimer({"train step": 600.0, "data": 10.0})
    speed = Speed(timer, started=started)
    clock.run(100)
    with timer.step():
        clock.run(150)
    assert started == 100
    assert speed.flush()["goodput"] == 750 / 1250
    lines = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["processes"]) for line in lines] == [(0, 1), (60, 1)]


def test_memory_is_the_fullest_device(monkeypatch):
    full = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**30})
    less = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 2**30})
    none = types.SimpleNamespace(memory_stats=lambda: None)
    monkeypatch.setattr(telemetry.jax, "local_devices", lambda: [less, full, none])
    assert Speed(StepTimer()).flush() == {"device_memory_gib": 3.0}
    monkeypatch.setattr(telemetry.jax, "local_devices", lambda: [none])
    assert Speed(StepTimer()).flush() == {}


def test_a_window_of_steps_is_traced(tmp_path):
    with Profiler("2:4", tmp_path) as profiler:
        for step in range(3):
            profiler.at(step, jnp.ones(()))
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                jax.block_until_ready(jnp.arange(10) * step)
        assert not list(tmp_path.rglob("*.xplane.pb"))
    # The run ended before step 4, so the trace ends early but is written.
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    with Profiler("", tmp_path / "none") as profiler:
        profiler.at(0, None)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="'5:5': expected START:STOP, such as 20:25"):
        Profiler("5:5", tmp_path)


def test_mfu_is_on_the_console(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    with Telemetry(tmp_path, 1, console=console) as records:
        records.log(0, {"loss": 2.0, "mfu": 0.5432})
    assert "MFU 54.3%" in console.file.getvalue()


def test_weights_and_biases_goes_on_with_its_run(tmp_path, monkeypatch):
    """A stand-in replaces the package; it has the three functions that we call."""
    started, logged = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    stand_in = types.SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for step in range(2):
        options = dict(console=Console(file=io.StringIO()), wandb={"project": "pangea"})
        with Telemetry(tmp_path, 2, start_step=step, **options) as records:
            records.log(step, {"loss": 1.0})
    assert logged == [(0, {"loss": 1.0}), "end", (1, {"loss": 1.0}), "end"]
    first, second = started
    assert first == second
    assert first["project"] == "pangea" and first["resume"] == "allow" and len(first["id"]) == 16
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed: pip install"):
        Telemetry(tmp_path, 2, wandb={"project": "pangea"})


@pytest.mark.parametrize("line", [b"{", b"null", b'{"time": "x"}', b'{"time": NaN}', b"\xff" * 9])
def test_a_first_start_that_cannot_be_read_is_said(tmp_path, line, caplog):
    (tmp_path / "starts.jsonl").write_bytes(line)
    assert telemetry.record_start(tmp_path, 3) is None
    assert "line 1: no start of a run" in caplog.text
    lines = (tmp_path / "starts.jsonl").read_bytes().splitlines()
    assert lines[0] == line and json.loads(lines[1])["step"] == 3


def test_goodput_survives_a_clock_that_was_wrong(clock, monkeypatch, tmp_path, caplog):
    def set_clock(ahead):
        monkeypatch.setattr(telemetry.time, "time", lambda: clock() + ahead)

    set_clock(1e6)
    telemetry.record_start(tmp_path, 0)
    set_clock(0)
    started = telemetry.record_start(tmp_path, 60)
    assert started == clock()
    assert "the run began 11 days, 13:46:40 in the future" in caplog.text
    for ahead in (0, -1e5):  # and it is set back once more
        set_clock(ahead)
        timer = StepTimer({"train step": 600.0, "data": 200.0})
        speed = Speed(timer, started=started)
        with timer.step():
            clock.run(200)
        assert speed.flush()["goodput"] == pytest.approx(0.8)


def test_metrics_that_are_no_text_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        telemetry.trim_metrics(tmp_path / "metrics.jsonl", 5)
