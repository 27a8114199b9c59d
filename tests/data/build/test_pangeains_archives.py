"""Building a store of PangeaIns from archives: cut up, changed between two runs, with names in common."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from pangea_jax.data.build import pangeains
from pangea_jax.data.build.pangeains import Build, BuildError, TooManyRejected
from pangea_jax.data.store import RecordStore
from tests.data.build.released import (
    PICTURES,
    RECORDS,
    SMALL,
    Killed,
    KilledAfter,
    encoded,
    make,
    noise,
    record,
    write_source,
)


def write_tar(path, pictures):
    with tarfile.open(path, "w") as archive:
        for name, data in pictures.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_pictures_from_a_split_tar_file_and_absolute_paths(tmp_path):
    path = tmp_path / "whole.tar"
    write_tar(path, {name.removeprefix("general/"): data for name, data in PICTURES.items()})
    data = path.read_bytes()
    parts = {
        f"general/part_0{n}": data[n * 9_000 : (n + 1) * 9_000]
        for n in range(len(data) // 9_000 + 1)
    }
    absolute = json.loads(json.dumps(RECORDS).replace('"general/set/', '"/data/x/general/set/'))
    write_source(tmp_path / "s", absolute, parts)
    write_source(tmp_path / "plain", RECORDS, PICTURES)
    for name in ("s", "plain"):
        make(tmp_path / name, tmp_path / "stores" / name, **SMALL)
    store, plain = (RecordStore(tmp_path / "stores" / name) for name in ("s", "plain"))
    assert list(store.records("train")) == list(plain.records("train"))
    for name, picture in PICTURES.items():
        assert store.image(f"images/{name}") == picture


# After 2: chunks parsed; after 5: planned; after 8: pictures stored; after 12: records as well.
@pytest.mark.parametrize("after", [2, 5, 8, 12])
def test_archive_repacked_after_a_kill_gives_its_own_pictures(tmp_path, after):
    # All of one size, so that another order is another picture at the same place.
    data = {f"general/set/{n}.jpg": encoded(noise(40, 30, n)) for n in range(10)}
    room = max(map(len, data.values()))
    data = {name: picture.ljust(room, b"\0") for name, picture in data.items()}
    write_source(tmp_path / "s", RECORDS, {})
    write_tar(tmp_path / "s" / "pictures.tar", data)
    build = Build(tmp_path / "s", tmp_path / "o", **SMALL)
    with pytest.raises(Killed):
        pangeains.build(build, KilledAfter(after, build))
    write_tar(tmp_path / "s" / "pictures.tar", dict(reversed(data.items())))
    make(tmp_path / "s", tmp_path / "o", **SMALL)
    store = RecordStore(tmp_path / "o")
    store.verify()
    for name, picture in data.items():
        assert store.image(f"images/{name}") == picture


def test_broken_archive_is_replaced_and_the_same_command_goes_on(tmp_path):
    records = [record(f"r{n}", f"a/{n}.jpg") for n in range(8)]
    pictures = {f"a/{n}.jpg": encoded(noise(20, 10, n)) for n in range(8)}
    write_source(tmp_path / "s", records, {})
    write_tar(tmp_path / "s" / "p.tar", pictures | {"a/3.jpg": b"broken"})
    with pytest.raises(TooManyRejected):
        make(tmp_path / "s", tmp_path / "o", **SMALL)
    write_tar(tmp_path / "s" / "p.tar", pictures)
    assert make(tmp_path / "s", tmp_path / "o", **SMALL)["kept"] == 8
    store = RecordStore(tmp_path / "o")
    assert [store.image(f"images/{name}") for name in pictures] == list(pictures.values())


def test_finished_store_of_other_archives_is_refused(tmp_path):
    pictures = {"a/0.jpg": encoded(noise(20, 10))}
    write_source(tmp_path / "s", [record("r", "a/0.jpg")], {})
    write_tar(tmp_path / "s" / "p.tar", pictures)
    summary = make(tmp_path / "s", tmp_path / "o")
    assert make(tmp_path / "s", tmp_path / "o") == summary
    write_tar(tmp_path / "s" / "p.tar", pictures | {"a/1.jpg": b"more"})
    with pytest.raises(BuildError, match=r"archives that have changed since \(p\.tar\)"):
        make(tmp_path / "s", tmp_path / "o")
    assert RecordStore(tmp_path / "o").image("images/a/0.jpg") == pictures["a/0.jpg"]


def test_shards_placed_by_a_killed_build_of_other_archives_do_not_stay(tmp_path, monkeypatch):
    records = [record(f"r{n}", f"a/{n}.jpg") for n in range(8)]
    write_source(tmp_path / "s", records, {})
    write_tar(tmp_path / "s" / "p.tar", {f"a/{n}.jpg": encoded(noise(80, 60)) for n in range(8)})
    folder = tmp_path / "o" / "images" / "1.0.0"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(pangeains.write_store, "write_manifest", lambda *_: raise_(Killed))
        make(tmp_path / "s", tmp_path / "o", **SMALL)
    before = {path.name for path in folder.glob("*.array_record-*")}
    write_tar(tmp_path / "s" / "p.tar", {f"a/{n}.jpg": encoded(noise(20, 10)) for n in range(8)})
    make(tmp_path / "s", tmp_path / "o", **SMALL)
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    listed = {Path(name).name for name in manifest["files"]}
    after = {path.name for path in folder.glob("*.array_record-*")}
    assert after <= listed and len(after) < len(before)


def raise_(error):
    raise error


def test_same_name_in_two_archives_is_two_pictures(tmp_path):
    split = {name: encoded(noise(20, 10, n)) for n, name in enumerate(("train", "val"))}
    (tmp_path / "s" / "x").mkdir(parents=True)
    for name, picture in split.items():
        write_tar(tmp_path / "s" / "x" / f"{name}.tar", {"0.png": picture})
    write_source(tmp_path / "s", [record(name, f"x/{name}/0.png") for name in split], {})
    make(tmp_path / "s", tmp_path / "o")
    store = RecordStore(tmp_path / "o")
    found = {r.id: store.image(r.images[0]) for r in store.records("train")}
    assert found == split
