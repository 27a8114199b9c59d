"""Which rows stay when frequent subjects and languages are thinned out."""

import pytest

from pangea_jax.curation import balance, workflow
from pangea_jax.curation.accounting import Passed


@pytest.mark.parametrize(
    ("per_subject", "per_language", "left"),
    [
        (None, None, {"ja": (9, 2, 5), "es": (3,)}),
        (4, None, {"ja": (4, 2, 4), "es": (3,)}),
        (None, 8, {"ja": (3, 2, 3), "es": (3,)}),
        (4, 3, {"ja": (1, 1, 1), "es": (3,)}),
        (None, 2, {"ja": (0, 0, 0), "es": (2,)}),
    ],
)
def test_thresholds_level_subjects_before_languages(per_subject, per_language, left):
    cells = {("ja", "a"): 9, ("ja", "b"): 2, ("ja", "c"): 5, ("es", "a"): 3}
    found = balance.thresholds(cells, balance.Balance(per_subject, per_language))
    assert tuple(found.values()) == (*left["ja"], *left["es"])


@pytest.fixture
def job(tmp_path):
    found = workflow.Job(tmp_path / "job", ("balance",), 8)
    with found.started({}):
        yield found


def test_the_balance_keeps_the_same_rows_in_any_order_and_fewer_of_them_when_lower(job):
    rows = [{"id": str(n), "language": "ja", "subject": "ab"[n % 3 == 0]} for n in range(60)]
    job.split("x", (Passed(row) for row in rows))
    job.split("y", (Passed(row) for row in reversed(rows)))

    def kept(part, limit, seed=0):
        outcomes = list(balance.balanced(job, part, balance.Balance(per_subject=limit, seed=seed)))
        assert len(outcomes) == 60
        return {o.row["id"] for o in outcomes if isinstance(o, Passed)}

    assert len(kept("x", 15)) == 30 and kept("x", 15) == kept("y", 15)
    assert kept("x", 7) < kept("x", 15) and kept("x", 15) != kept("x", 15, seed=1)
    assert len(kept("x", None)) == 60
