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
