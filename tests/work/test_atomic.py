"""Files are written whole, and differences of JSON values are found."""

import json

import pytest

from pangea_jax.work import atomic


def test_a_failed_write_does_not_change_the_file(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_json(path, {"a": "é"}, ensure_ascii=False)
    assert json.loads(path.read_bytes()) == atomic.read_json(path) == {"a": "é"}
    before = path.read_bytes()
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_differences_are_named_by_their_keys():
    theirs = {"same": [1], "llm": {"model": "a", "seed": 0}, "gone": 1, "kind": {"x": 1}}
    ours = {"same": [1], "llm": {"model": "b", "seed": 0}, "new": 2, "kind": 3}
    assert atomic.differences(theirs, ours) == {
        "gone": (1, None),
        "kind": ({"x": 1}, 3),
        "llm.model": ("a", "b"),
        "new": (None, 2),
    }
    assert atomic.differences(theirs, ours, "config")["config.llm.model"] == ("a", "b")
    assert atomic.differences(ours, ours) == {}


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[" * 100_000])
def test_damaged_json_names_its_file(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.json is damaged: not JSON"):
        atomic.read_json(tmp_path / "plan.json")


def test_a_sum_of_json_outlives_writing_and_changes_with_a_value():
    value = {"b": {1: (0.1, float("nan"))}, "a": None}
    assert atomic.json_sum(json.loads(json.dumps(value))) == atomic.json_sum(value)
    assert atomic.json_sum(value | {"a": 0}) != atomic.json_sum(value)
