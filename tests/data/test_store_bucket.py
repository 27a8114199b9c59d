"""A store in a bucket: the same records, few requests, errors that tell a refused bucket from a damaged store."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from pangea_jax.data.store import INDEX, MANIFEST, RecordStore, StoreError
from pangea_jax.work import paths
from tests.data.test_store import PICTURES, ROWS, write

SHARDS = 2000


@pytest.fixture(scope="module")
def stores(emulator, tmp_path_factory):
    """The same store on a disk and in the bucket."""
    local = write(tmp_path_factory.mktemp("store"))
    remote = paths.path(f"{emulator.url}/store")
    paths.store(remote).put(f"{local}/", f"{remote}/", recursive=True)
    return RecordStore(local), RecordStore(remote)


def test_records_and_pictures_are_those_of_the_disk(bucket, stores):
    local, remote = stores
    assert remote.index.equals(local.index) and remote.image_index.equals(local.image_index)
    mine, theirs = local.records("train"), remote.records("train")
    assert [theirs[n] for n in range(0, len(ROWS), 7)] == [mine[n] for n in range(0, len(ROWS), 7)]
    assert [remote.image(picture.key) for picture in PICTURES] == [p.encoded for p in PICTURES]
    remote.verify()
    again = pickle.loads(pickle.dumps(remote))  # as for a worker
    assert again.records("test")[0] == local.records("test")[0]


def test_threads_that_share_a_store_read_the_right_records(bucket, stores):
    source = RecordStore(stores[1].directory).records("train")
    order = [number * 37 % len(ROWS) for number in range(len(ROWS))]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, order)) == [ROWS[number] for number in order]


def test_a_read_is_one_request(bucket, stores):
    source = RecordStore(stores[1].directory).records("train")
    source[0]
    bucket.forget()
    for number in (17, 250, 99):
        source[number]
    assert len(bucket.requests) == 3


def test_opening_many_shards_takes_few_requests(bucket, stores):
    local = stores[0].directory
    manifest = json.loads((local / MANIFEST).read_text())
    shard = manifest["records"]["train"][0]
    manifest["records"]["train"] = [shard] * SHARDS
    top = paths.path(f"{bucket.url}/many")
    (top / MANIFEST).write_text(json.dumps(manifest))
    for name in (INDEX, "images.parquet", shard["path"]):
        paths.store(top).put_file(str(local / name), f"{top}/{name}")
    bucket.forget()
    store = RecordStore(top)
    assert store.index.num_rows == len(ROWS) + 1 and store.image_index.num_rows == len(PICTURES)
    assert len(store.records("train")) == SHARDS * len(ROWS)
    store._positions  # noqa: B018
    assert len(bucket.requests) <= 10, bucket.requests
    opened = len(bucket.requests)
    store.records("train")[SHARDS * len(ROWS) - 1]
    assert len(bucket.requests) == opened + 2  # the shard's end, and the record


@pytest.mark.parametrize("code", [503, 429, 0])
def test_what_passes_is_tried_again(bucket, stores, code):
    store = RecordStore(stores[1].directory)
    bucket.fail(code, 2, name="records")
    assert store.records("train")[5] == ROWS[5]
    assert not bucket.left


@pytest.mark.parametrize("code", [401, 403])
def test_a_bucket_that_refuses_is_no_damaged_store(bucket, stores, code):
    store = RecordStore(stores[1].directory)
    bucket.fail(code, 9, name="records")
    with pytest.raises(paths.BucketError, match="the bucket refuses access"):
        store.records("train")[5]


def test_a_missing_or_damaged_shard_is_named(bucket, stores):
    top = paths.path(f"{bucket.url}/broken")
    paths.store(top).put(f"{stores[0].directory}/", f"{top}/", recursive=True)
    shard = next(name for name in paths.sizes(top) if "train.array_record" in name)
    (top / shard).write_bytes(paths.read_bytes(top / shard)[:-40])
    with pytest.raises(StoreError, match="is damaged"):
        RecordStore(top).records("train")[5]
    with pytest.raises(StoreError, match="bytes, expected"):
        RecordStore(top).verify()
    (top / shard).unlink()
    with pytest.raises(StoreError, match=r"gs://pangea/broken/records/.* is missing; rebuild"):
        RecordStore(top).records("train")[5]
    (top / INDEX).unlink()
    with pytest.raises(StoreError, match=r"index\.parquet is missing"):
        RecordStore(top).index  # noqa: B018
    with pytest.raises(StoreError, match=r"manifest\.json is missing; build the store"):
        RecordStore(paths.path(f"{bucket.url}/none"))
