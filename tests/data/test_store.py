import contextlib
import pickle
import resource

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from pangea_jax.data.build.write_store import (
    PICTURE_CODEC,
    PICTURE_SCHEMA,
    IndexWriter,
    Picture,
    write_shard,
    write_store,
)
from pangea_jax.data.record import Conversation, RecordError, Turn
from pangea_jax.data.store import MANIFEST, RecordStore, ShardReader, StoreError


def conversation(number: int, image: bool = True) -> Conversation:
    marker = "<image>\n" if image else ""
    return Conversation(
        id=f"r{number}",
        source="made",
        language="sw",
        category="count",
        images=(f"blue/{number % 3}",) if image else (),
        turns=(Turn("user", f"{marker}Ni ngapi? {number}"), Turn("assistant", f"猫 {number}")),
    )


ROWS = [conversation(number, image=number % 4 != 0) for number in range(300)]
PICTURES = [Picture(f"blue/{n}", bytes([n, 0, 255]) * 50, 5, 10) for n in range(3)]


def write(directory, rows=ROWS):
    write_store(
        directory,
        name="made",
        build="python launch/build_data.py made",
        records={
            "train": ((row, {"concept": row.id[-1]}) for row in rows),
            "test": iter([(rows[0], {"concept": None})]),
        },
        images={"blue": iter(PICTURES)},
        columns=("concept",),
    )
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("store"))


@pytest.fixture
def scratch(tmp_path):
    return write(tmp_path)


def shard(directory):
    return next(directory.glob("records/*/*-train.array_record*"))


def test_reading_gives_what_was_written(directory):
    store = RecordStore(directory)
    assert store.splits == ("train", "test")
    assert list(store.records("train")) == ROWS
    assert store.records("train")[-1] == ROWS[-1]
    assert [store.image(p.key) for p in PICTURES] == [p.encoded for p in PICTURES]
    assert store.collections == ("blue",)
    with pytest.raises(IndexError):
        store.records("train")[len(ROWS)]


def test_index_describes_the_records(directory):
    store = RecordStore(directory)
    rows = [row for row in store.index.to_pylist() if row["split"] == "train"]
    assert [row["position"] for row in rows] == list(range(len(ROWS)))
    source = store.records("train")
    for row in rows[::7]:
        record = source[row["position"]]
        assert (row["id"], row["kind"]) == (record.id, record.kind)
        assert (row["num_images"], row["num_turns"]) == (len(record.images), 2)
        assert row["concept"] == record.id[-1]
    sizes = store.image_index.to_pylist()
    assert [(s["width"], s["height"], s["num_bytes"]) for s in sizes] == [(5, 10, 150)] * 3


def test_tfds_reads_it_unchanged(directory):
    folder = directory / "records" / "1.0.0"
    source = tfds.builder_from_directory(folder).as_data_source("train")
    assert len(source) == len(ROWS)
    example = source[5]
    assert example["id"].decode() == "r5"
    assert [text.decode() for text in example["texts"]] == [turn.text for turn in ROWS[5].turns]
    pictures = tfds.builder_from_directory(directory / "images_blue" / "1.0.0")
    assert pictures.as_data_source("blue")[1]["encoded"] == PICTURES[1].encoded


def test_examples_are_stored_in_canonical_bytes(directory):
    reader = array_record_module.ArrayRecordReader(str(shard(directory)))
    for raw in reader.read_all():
        example = tf_example_pb2.Example.FromString(raw)
        assert raw == example.SerializeToString(deterministic=True)


def test_writing_twice_gives_equal_files(directory, scratch):
    names = sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(scratch) for p in scratch.rglob("*") if p.is_file())
    assert all((directory / name).read_bytes() == (scratch / name).read_bytes() for name in names)


def test_source_feeds_grain_and_pickles(directory):
    source = pickle.loads(pickle.dumps(RecordStore(directory).records("train")))
    dataset = grain.MapDataset.source(source).seed(1).shuffle().map(lambda record: record.id)
    assert sorted(dataset) == sorted(row.id for row in ROWS)
    assert list(dataset) != [row.id for row in ROWS]


def test_opened_store_pickles(directory):
    store = RecordStore(directory)
    store.index, store.image("blue/1")
    again = pickle.loads(pickle.dumps(store))
    assert again.image("blue/2") == PICTURES[2].encoded
    assert again.index.equals(store.index)


def test_shards_follow_one_another(tmp_path):
    lengths, paths = [3, 1, 4], []
    for number, length in enumerate(lengths):
        paths.append(tmp_path / f"{number}.array_record")
        writer = array_record_module.ArrayRecordWriter(str(paths[-1]), "group_size:2")
        for local in range(length):
            writer.write(f"{number}:{local}".encode())
        writer.close()
    reader = ShardReader(paths, lengths, "rebuild")
    expected = [f"{n}:{i}".encode() for n, length in enumerate(lengths) for i in range(length)]
    assert [reader.read(position) for position in range(len(reader))] == expected


def damaged(kind, data):
    if kind == "truncated":
        return data[:1_000]
    if kind == "garbage":
        return bytes(range(256)) * (len(data) // 256)
    # The shard is padded to 64 KiB; its first kilobytes hold records.
    return bytes(byte ^ 255 if 1_000 <= i < 1_100 else byte for i, byte in enumerate(data))


@pytest.mark.parametrize("kind", ["truncated", "garbage", "flipped"])
def test_damage_is_named_with_the_remedy(scratch, kind):
    path = shard(scratch)
    path.write_bytes(damaged(kind, path.read_bytes()))
    store = RecordStore(scratch)
    with pytest.raises(StoreError, match=r"rebuild the store with `python launch/build_data\.py"):
        list(store.records("train"))
    with pytest.raises(StoreError, match=path.name) as caught:
        store.verify()
    assert str(scratch) in str(caught.value)


@pytest.mark.parametrize("name", ["index.parquet", "images.parquet", "shard"])
def test_missing_file_is_named(scratch, name):
    path = shard(scratch) if name == "shard" else scratch / name
    path.unlink()
    store = RecordStore(scratch)
    read = {
        "index.parquet": lambda: store.index,
        "images.parquet": lambda: store.image("blue/1"),
        "shard": lambda: store.records("train")[0],
    }
    for action in (read[name], store.verify):
        with pytest.raises(StoreError, match=f"{path.name} is missing; rebuild"):
            action()


def test_directory_without_a_store(tmp_path):
    with pytest.raises(StoreError, match=r"manifest.json is missing; build the store with"):
        RecordStore(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(StoreError, match="is not a manifest"):
        RecordStore(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 99, "build": "x"}')
    with pytest.raises(StoreError, match="has format 99, expected 1"):
        RecordStore(tmp_path)


def test_unknown_names(directory):
    store = RecordStore(directory)
    with pytest.raises(KeyError, match=r"no split 'dev'.*train"):
        store.records("dev")
    with pytest.raises(KeyError, match="no picture 'blue/9'"):
        store.image("blue/9")


def test_sound_store_verifies(directory):
    RecordStore(directory).verify()


def test_a_store_of_pictures_alone_replaces_one_with_records(scratch):
    build = "python launch/build_data.py made"
    write_store(scratch, name="made", build=build, records={}, images={"blue": iter(PICTURES)})
    assert not (scratch / "index.parquet").exists() and not (scratch / "records").exists()
    store = RecordStore(scratch)
    store.verify()
    assert (store.splits, store.collections) == ((), ("blue",))
    assert store.image("blue/2") == PICTURES[2].encoded


def test_bad_record_stops_the_writer_and_leaves_no_store(tmp_path):
    bad = Conversation(
        "x", "made", "sw", "", ("blue/1",), (Turn("user", "?"), Turn("assistant", "!"))
    )
    with pytest.raises(RecordError, match="markers and images differ"):
        write(tmp_path, rows=[bad])
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def full_disk(room):
    """Limits the size of every file to `room` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_an_error_of_the_disk(tmp_path):
    pictures = [np.random.default_rng(n).bytes(10_000) for n in range(30)]
    path = tmp_path / "images.array_record"
    with (
        full_disk(100_000),
        pytest.raises(OSError, match=r"images\.array_record cannot be written: .*File too large"),
    ):
        write_shard(path, pictures, PICTURE_CODEC)
    assert not path.exists()
    row = dict.fromkeys(PICTURE_SCHEMA.names, 1) | {"collection": "made"}
    with (
        full_disk(1_000),
        pytest.raises(OSError, match="File too large"),
        IndexWriter(tmp_path / "images.parquet", PICTURE_SCHEMA) as index,
    ):
        for picture in pictures * 3_000:
            index.add(row | {"key": picture[:50].hex() + str(len(index._rows))})


def test_a_missing_package_is_no_damage(tmp_path):
    def parse_record(raw):
        raise ModuleNotFoundError("No module named 'tensorflow_datasets'")

    path = tmp_path / "x.array_record"
    write_shard(path, [b"record"], "zstd")
    with pytest.raises(ModuleNotFoundError, match="tensorflow_datasets"):
        ShardReader([path], [1], "rebuild").parsed(0, parse_record)
