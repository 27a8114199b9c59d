"""A short soak; `python -m tests.soak` runs a long one."""

import pytest

from tests import soak


def test_a_build_that_is_killed_and_damaged(capsys):
    soak.main(["--stages=build", "--kills=2", "--damages=2", "--seed=3", "--no_disk"])
    said = capsys.readouterr().out
    assert said.count("kill ") == 2 and "nothing was lost" in said


@pytest.mark.slow
@pytest.mark.parametrize("stage", soak.STAGES[1:])
def test_training_and_evaluation_that_are_killed_and_damaged(stage):
    stages = "train" if stage == "train" else "train,evaluate"
    soak.main(
        [f"--stages={stages}", "--kills=2", "--damages=2", "--seed=1", "--steps=12", "--no_disk"]
    )
