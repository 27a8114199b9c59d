"""The training loop with a step that only adds numbers."""

import io
import json
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from rich.console import Console

from pangea_jax import sharding
from pangea_jax.batch import Batch
from pangea_jax.train.guards import Guard, GuardConfig
from pangea_jax.train.loop import Loop
from pangea_jax.train.telemetry import Profiler, Speed, StepTimer, Telemetry


@struct.dataclass
class State:
    step: jax.Array
    total: jax.Array


@jax.jit
def add(state, batch):
    tokens = batch.tokens.sum().astype(jnp.float32)
    ones = dict.fromkeys(("target_tokens", "tokens", "examples", "accuracy", "grad_norm"), 1.0)
    metrics = {"loss": tokens, "skipped": jnp.isinf(tokens), **ones}
    return State(state.step + 1, state.total + tokens), metrics


class Saves:
    """Replaces `Checkpoints` and records what it gets."""

    def __init__(self):
        self.saved, self.closed = [], 0

    def keep_best(self, step):
        self.best = step

    def save(self, state, data, progress):
        self.saved.append((int(state.step), float(state.total), next(iter(data.left)), progress))

    def close(self):
        self.closed += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Data:
    """Rows of ones, twos, threes, ..."""

    def __init__(self, left=None):
        self.left = list(range(1, 100) if left is None else left)

    def __next__(self):
        tokens = np.full((2, 3), self.left.pop(0))
        return Batch(tokens, tokens, tokens, tokens)


@pytest.fixture
def make(tmp_path):
    def loop(**changes):
        timer = StepTimer()
        console = Console(file=io.StringIO())
        telemetry = Telemetry(tmp_path, 7, start_step=changes.pop("first", 0), console=console)
        parts = dict(
            step_fn=add,
            mesh=sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]),
            total_steps=7,
            log_every=2,
            save_every=3,
            checkpoints=Saves(),
            telemetry=telemetry,
            timer=timer,
            speed=Speed(timer),
            guard=Guard(GuardConfig(), lambda step, rows: None),
            extra=lambda step, digest: {"data/digest": digest},
            on_first_batch=lambda rows: None,
            stop=lambda step: False,
            profiler=Profiler("", tmp_path),
        )
        return Loop(**parts | changes)

    return loop


def start(step=0, total=0.0):
    return jax.device_put(State(jnp.int32(step), jnp.float32(total)))


def logged(tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["data/digest"]) for line in lines]


def test_what_is_logged_and_saved_when(make, tmp_path):
    seen = []
    loop = make(on_first_batch=seen.append)
    state = loop.run(start(), Data())
    assert float(state.total) == 6 * sum(range(1, 8))
    assert len(seen) == 1 and seen[0].tokens[0, 0] == 1
    # A line covers the steps since the line before. Here the loss of step n is 6 * n.
    assert [(step, loss) for step, loss, _ in logged(tmp_path)] == [
        (1, 9),
        (3, 21),
        (5, 33),
        (6, 42),
    ]
    # At a save the loop has read no batch beyond the last step.
    saved = [(step, total, following) for step, total, following, _ in loop.checkpoints.saved]
    assert saved == [(3, 36, 4), (6, 126, 7), (7, 168, 8)]
    assert loop.checkpoints.closed


def test_it_goes_on_from_a_save_between_two_lines(make, tmp_path):
    whole = make()
    whole.run(start(), Data())
    expected = logged(tmp_path)
    progress = whole.checkpoints.saved[0][3]
    again = make(first=3)
    again.set_progress(progress)
    again.run(start(3, 36.0), Data(range(4, 100)))
    assert logged(tmp_path) == expected


def test_asked_to_stop_it_saves_and_leaves(make):
    asked = []
    loop = make(stop=lambda step: asked.append(step) or step == 3)
    state = loop.run(start(), Data())
    assert int(state.step) == 4
    assert asked == [0, 1, 2, 3]
    assert [step for step, *_ in loop.checkpoints.saved] == [3, 4]
    assert loop.stopped


@pytest.mark.parametrize("asked", [False, True])
def test_asked_to_stop_at_the_last_step_it_says_so(make, asked):
    """The next start then does what follows training, such as an evaluation."""
    loop = make(stop=lambda step: asked and step == 6)
    assert int(loop.run(start(), Data()).step) == 7
    assert loop.stopped is asked


def test_the_speed_is_not_of_the_first_batch(make, tmp_path):
    """Before the first batch the data workers start, which takes as long as many steps."""

    class Slow(Data):
        def __next__(self):
            time.sleep(0.5 if self.left[0] == 1 else 0)
            return super().__next__()

    make().run(start(), Slow())
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["seconds_per_step"] < 0.25


def test_the_host_is_one_step_ahead_no_more(make):
    events = []

    def step_fn(state, batch):
        events.append(("begun", len(events)))
        return add(state, batch)

    loop = make(step_fn=step_fn, log_every=100, save_every=100)
    check = loop.guard.check
    loop.guard = types.SimpleNamespace(
        check=lambda step, *rest: events.append(("read", step)) or check(step, *rest),
        get_state=loop.guard.get_state,
    )
    loop.run(start(), Data())
    ahead = np.cumsum([1 if kind == "begun" else -1 for kind, _ in events])
    assert ahead.max() == 2  # one step runs, and one has just been read
    assert [step for kind, step in events if kind == "read"] == list(range(7))


def test_an_implicit_transfer_is_an_error(make):
    constant = np.ones((), np.float32)
    loop = make(step_fn=lambda state, batch: add(state.replace(total=constant), batch))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(start(), Data())


def test_after_an_error_what_is_being_written_is_waited_for(make):
    loop = make(step_fn=lambda state, batch: {}["nothing"])
    with pytest.raises(KeyError):
        loop.run(start(), Data())
    assert loop.checkpoints.closed == 1


def test_data_that_end_early_are_an_error(make, tmp_path):
    class Short(Data):
        def __next__(self):
            return super().__next__() if self.left else next(iter(()))

    with pytest.raises(ValueError, match=r"the data ended before step 4 of 7; lower config\.steps"):
        make().run(start(), Short([1, 2, 3, 4]))


class Scores:
    """Replaces `Validator`: gives one loss after another."""

    def __init__(self, losses, every):
        self.left, self.every, self.seen, self.best = list(losses), every, [], None

    def due(self, step):
        return (step + 1) % self.every == 0

    def run(self, state, step):
        loss = self.left.pop(0)
        self.seen.append((step, int(state.step)))
        if step >= 0 and (self.best is None or loss < self.best[0]):
            self.best = loss, step + 1
        return {"validation/loss": loss}

    @property
    def best_step(self):
        return self.best and self.best[1]

    def describe(self, found):
        return "said"

    def results(self):
        return {"best": self.best}

    def set_state(self, state):
        self.best = state["best"]


def test_validates_before_when_due_and_at_the_end_and_keeps_the_best(make, tmp_path):
    validator = Scores([5.0, 3.0, 2.0, 2.5, 2.4], every=2)
    loop = make(validator=validator, save_every=100, log_every=100)
    loop.run(start(), Data())
    assert validator.seen == [(-1, 0), (1, 2), (3, 4), (5, 6), (6, 7)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["validation/loss"]) for line in lines]
    assert found == [(1, 3.0), (3, 2.0), (5, 2.5), (6, 2.4)]
    assert all("loss" in line for line in lines)
    # A better loss is saved at once; the best of all is kept.
    assert [step for step, *_ in loop.checkpoints.saved] == [2, 4, 7]
    assert loop.checkpoints.best == 4
    assert loop.timer.summary()["validation"]["seconds"] >= 0


def test_a_resumed_run_remembers_its_best(make):
    loop = make(validator=Scores([5.0, 3.0], every=2), stop=lambda step: step == 1)
    loop.run(start(), Data())
    progress = loop.checkpoints.saved[-1][-1]
    resumed = make(validator=Scores([4.0] * 3, every=2), first=2)
    resumed.set_progress(json.loads(json.dumps(progress)))
    resumed.run(start(2, 18.0), Data(range(3, 100)))
    assert resumed.validator.seen[0] == (3, 4)  # not again before the first step
    assert resumed.checkpoints.best == 2
