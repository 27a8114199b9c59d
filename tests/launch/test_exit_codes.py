"""Exit codes tell a launcher whether to run the same command again."""

import pytest

from tests.launch.conftest import call


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("INTERNAL: an NCCL call failed", 134),
        ("UNAVAILABLE: the host has gone", 134),
        ("RESOURCE_EXHAUSTED: out of memory", 1),
        ("INVALID_ARGUMENT: no such thing", 1),
    ],
)
def test_a_lost_device_is_not_an_error_that_would_come_again(message, code):
    program = (
        "import jax\nfrom launch import common\n"
        f"def main(argv):\n    raise jax.errors.JaxRuntimeError({message!r})\n"
        "common.run(main)\n"
    )
    done = call("-c", program)
    assert done.returncode == code, done.stderr
    assert message in done.stderr


def test_an_error_that_a_librarys_threads_log_is_told_once(tmp_path):
    """Each of Orbax' threads logs an error of a save with its traceback, then the save raises it."""
    library = tmp_path / "orbax" / "threads.py"
    library.parent.mkdir()
    library.write_text(
        "from absl import logging\n"
        "def save():\n"
        "    for _ in range(3):\n"
        "        try:\n"
        "            open('/nowhere/file')\n"
        "        except OSError as error:\n"
        "            last = OSError(28, 'No space left on device')\n"
        "            logging.exception('a thread failed: %s', last)\n"
        "    raise last\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(library.parent)!r})\n"
        "import threads\nfrom launch import common\n"
        "common.run(lambda argv: threads.save())\n"
    )
    done = call("-c", program)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("a thread failed") == 1
    assert "error: the disk is full ([Errno 28]" in done.stderr
