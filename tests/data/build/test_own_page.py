"""The page "Your own data" of docs/data.md: each of its examples gives the same store."""

import re
from pathlib import Path

import pytest

from pangea_jax.data.build.own_records import FIELDS
from pangea_jax.data.store import RecordStore
from tests.data.build.own import build, built
from tests.data.build.released import encoded, noise

TEXT = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
PAGE = TEXT.split("## Your own data")[1].split("\n## ")[0]
EXAMPLES = dict(re.findall(r"<!-- form: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL))


def write_pictures(folder):
    (folder / "pics").mkdir(parents=True)
    for seed, name in enumerate("abcd"):
        (folder / f"pics/{name}.png").write_bytes(encoded(noise(9, 8, seed), "PNG"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_pictures(folder / "s")
    (folder / "s/data.csv").write_text(EXAMPLES["data.csv"], encoding="utf-8")
    build(folder / "s", folder / "o")
    records = list(RecordStore(folder / "o").records("train"))
    assert [(r.id, r.language) for r in records] == [
        *(("1", "sw"), ("2", "sw")),
        *(("3", "id"), ("4", "id")),
    ]
    assert records[3].turns[1].text == "Merah, atau jingga."
    return built(folder / "o")


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"data.csv", "python"}))
def test_examples_of_files(name, expected, tmp_path):
    write_pictures(tmp_path / "s")
    (tmp_path / "s" / name).write_text(EXAMPLES[name], encoding="utf-8")
    build(tmp_path / "s", tmp_path / "o")
    # Records that have no mark are no fault here: the page says what becomes of them.
    assert built(tmp_path / "o").keys() == expected.keys()
    same = {k: v for k, v in built(tmp_path / "o").items() if not k.startswith("report")}
    assert same == {k: v for k, v in expected.items() if not k.startswith("report")}


@pytest.mark.parametrize("source", ["saved", "data.parquet"])
def test_example_of_datasets(source, expected, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="datasets is in requirements-dev.txt")
    write_pictures(tmp_path)
    (tmp_path / "data.csv").write_text(EXAMPLES["data.csv"], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    code = EXAMPLES["python"].replace("# or data", "; data")
    exec(code.replace('split="train")', f'split="train", cache_dir="{tmp_path}/cache")'), {})
    build(tmp_path / source, tmp_path / "o", images=tmp_path)
    assert built(tmp_path / "o") == expected


def test_the_table_has_every_field():
    for field, names in FIELDS.items():
        assert f"`{field}`" in PAGE
        assert any(f"`{name}`" in PAGE for name in names), field
