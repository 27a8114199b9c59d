"""A store of generated conversations, see `tests.data.made`."""

import numpy as np
import pytest

from pangea_jax.data.build.write_store import write_store
from pangea_jax.data.pipeline import RowSource, render_example
from pangea_jax.data.store import RecordStore
from tests.data.made import CONFIG, CONVERSATIONS, SIZES, picture, reader_of, text_of


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    write_store(
        directory,
        name="made",
        build="python launch/build_data.py made",
        records={
            "train": ((c, {}) for c in CONVERSATIONS[:20]),
            "extra": ((c, {}) for c in CONVERSATIONS[20:]),
        },
        images={"made": iter([picture(i, size) for i, size in enumerate(SIZES)])},
        columns=(),
    )
    return RecordStore(directory)


@pytest.fixture(scope="session")
def reader(store, tiny_config, letters):
    return reader_of(tiny_config, letters, store)


@pytest.fixture(scope="session")
def source(store):
    return RowSource(store, np.arange(len(CONVERSATIONS)))


@pytest.fixture(scope="session")
def examples(reader, letters):
    """Maps the unique text of each conversation to its example."""
    rendered = [render_example(c, None, reader, CONFIG) for c in CONVERSATIONS]
    return {text_of(letters, example.tokens): example for example in rendered}
