"""A few hundred inputs for each target. `tests/fuzz/long.py` runs as many as you like."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import SEEDS, TARGETS, WORDS, changed, run

EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 12),
        st.sampled_from([0, 1, 1, 2, 8, 64, 1 << 12]),
        st.one_of(st.binary(max_size=4), st.sampled_from(WORDS)),
    ),
    max_size=5,
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=150,
    deadline=None,  # `run` counts the time of this process alone
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(number=st.integers(0, 6), edits=EDITS)
def test_a_value_or_the_modules_own_error(name, number, edits):
    seeds = SEEDS[name]
    run(name, changed(seeds[number % len(seeds)], edits))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_pass_and_so_do_their_beginnings(name):
    for seed in SEEDS[name]:
        for end in {*range(0, len(seed), max(1, len(seed) // 50)), len(seed)}:
            run(name, seed[:end])
