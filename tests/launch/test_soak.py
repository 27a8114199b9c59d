"""A short soak; `python -m tests.soak` runs a long one."""

import random

import pytest

from tests import soak

# A command that is long without a folder, and then writes two files, the first of which is read again.
SLOW = """
import pathlib, sys, time
time.sleep(0.5)
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
if (folder / "first").is_dir():
    sys.exit("first is a folder: remove it")
(folder / "first").write_text("1")
time.sleep(0.1)
(folder / "second").write_text("2")
"""


def test_no_disturbance_comes_before_the_first_file(tmp_path, capsys):
    def results(folder):
        return {path.name: path.read_text() for path in folder.iterdir()}

    stage = soak.Stage("slow", lambda to: ("-c", SLOW, to), results, ["first"], tmp_path / "slow")
    assert stage.finish() == ""
    expected = stage.results(stage.folder)
    # Most of its time passes before it writes, so most of these kills would come too early.
    soak.soak(stage, expected, stage.seconds, random.Random(0), kills=2, damages=3)
    assert capsys.readouterr().out.count(": first: ") >= 3


def test_a_build_that_is_killed_and_damaged(capsys):
    soak.main(["--stages=build", "--kills=2", "--damages=2", "--seed=3", "--no_disk"])
    said = capsys.readouterr().out
    assert said.count("kill ") == 2 and "nothing was lost" in said


@pytest.mark.slow
def test_training_and_evaluation_that_are_killed_and_damaged():
    stages = ",".join(soak.STAGES[1:])
    soak.main(
        [f"--stages={stages}", "--kills=1", "--damages=1", "--seed=1", "--steps=12", "--no_disk"]
    )
