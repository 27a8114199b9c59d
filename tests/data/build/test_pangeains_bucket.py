"""A store that is built into a bucket equals one on a disk, also after kills, and its shards never stay on the disk."""

import hashlib

import pytest

from launch import build_data
from pangea_jax.data.build import pangeains
from pangea_jax.data.build.pangeains import Build
from pangea_jax.data.store import RecordStore
from pangea_jax.work import paths, restart
from pangea_jax.work.runners import Local
from tests.data.build.released import (
    PICTURES,
    RECORDS,
    SMALL,
    Killed,
    KilledAfter,
    make,
    write_source,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"), RECORDS, PICTURES)


@pytest.fixture(scope="module")
def disk(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk") / "o"
    make(source, folder, **SMALL)
    return digests(folder)


def digests(folder):
    """SHA-256 of every file, by its path; without the list of the archives, which names folders of this machine."""
    return {
        name: hashlib.sha256(paths.read_bytes(folder / name)).hexdigest()
        for name in paths.sizes(folder)
        if name != pangeains.ARCHIVES
    }


def test_killed_at_any_step_it_goes_on(bucket, source, disk, tmp_path):
    target = paths.path(f"{bucket.url}/built")
    build = Build(source, tmp_path / "work", target=target, **SMALL)
    kills = 0
    for after in (1, 6, 8, 10, 30):
        try:
            pangeains.build(build, KilledAfter(after, build))
            break
        except Killed:
            kills += 1
            assert not (target / "manifest.json").exists()
    assert kills >= 3
    assert digests(target) == disk
    left = [name for name in paths.sizes(tmp_path / "work") if "array_record" in name]
    assert not left
    assert RecordStore(target).records("train")[0].id == "r0"


def test_killed_while_its_shards_are_put_in_place_it_goes_on(
    bucket, source, disk, tmp_path, monkeypatch
):
    target = paths.path(f"{bucket.url}/placed")
    build, move, left = Build(source, tmp_path / "work", target=target, **SMALL), paths.move, [3]

    def killed(file, to):
        if not left[0]:
            raise Killed
        left[0] -= 1
        move(file, to)

    monkeypatch.setattr(paths, "move", killed)
    with Local(1) as run, pytest.raises(Killed):
        pangeains.build(build, run)
    monkeypatch.undo()
    with Local(1) as run:
        pangeains.build(build, run)
    assert digests(target) == disk


def test_another_machine_is_refused(bucket, source, tmp_path):
    target = paths.path(f"{bucket.url}/claimed")
    build = Build(source, tmp_path / "work", target=target, **SMALL)
    with (
        restart.claim(target / "lock"),
        Local(1) as run,
        pytest.raises(restart.WorkError, match="is writing gs://pangea/claimed"),
    ):
        pangeains.build(build, run)
    assert not paths.children(target)


def test_the_command_asks_for_a_folder_here(bucket, source, disk, tmp_path, capsys):
    del disk
    words = ["pangeains", f"--source={source}", "--workers=1", f"--out={bucket.url}/command"]
    with pytest.raises(restart.WorkError, match="needs --work=DIR"):
        build_data.build_pangeains(build_data.parse_arguments(words))
    build_data.build_pangeains(build_data.parse_arguments([*words, f"--work={tmp_path / 'work'}"]))
    assert "20 of 20 records, 10 pictures" in capsys.readouterr().out
    there = paths.children(paths.path(f"{bucket.url}/command"))
    assert {
        "manifest.json",
        "index.parquet",
        "images.parquet",
        "records",
        "images",
        "report",
    } <= there
    with pytest.raises(restart.WorkError, match="takes no --work"):
        build_data.build_pangeains(
            build_data.parse_arguments(
                [*words[:3], f"--out={tmp_path / 'o'}", f"--work={tmp_path / 'w'}"]
            )
        )
