"""What is fuzzed: one function for each kind of input that others write.

A target gets bytes. It returns, or raises AssertionError if a property does not hold; every other exception is a
finding, too. `run` also holds the bounds on time and memory.
"""

# ruff: noqa: PT017 (an error is one of two good ends here)

import atexit
import io
import json
import resource
import shutil
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pangea_jax.checkpoints import CheckpointError
from pangea_jax.checkpoints.config import config_from_folder
from pangea_jax.checkpoints.files import INDEX, TensorFiles
from pangea_jax.data import chat, feed, image
from pangea_jax.data.build import archives, json_records
from pangea_jax.data.build.release import ReleaseError
from pangea_jax.data.record import IMAGE_MARKER, Conversation, RecordError, Turn
from pangea_jax.work.atomic import json_sum
from pangea_jax.work.untrusted import parse_json

SECONDS, MEBIBYTES = 5, 512
"""Bounds of one input: seconds of this process, and by how much its largest memory may grow."""

TURNS = [{"from": "human", "value": '<image>\nWhat \\ud83d\\ude00 is "this"?'}]
TURNS += [{"from": "gpt", "value": "a [cat] {é}"}]
RECORD = {
    "id": "r1",
    "image": "a/b.png",
    "conversations": TURNS,
    "language": "en",
    "n": [1, -2.5e3],
}


def _each(values, kept_or_rejected) -> None:
    for value in values:
        kept_or_rejected(value)


def _kept_or_rejected(value) -> None:
    """A record is kept, and then comes back equal from its own JSON, or is rejected."""
    try:
        kept = Conversation.from_pangeains(value, default_language="en")
    except RecordError as error:
        assert error.reason and error.field
        str(error).encode("utf-8", "backslashreplace")
    else:
        assert Conversation.from_pangeains(kept.to_pangeains()) == kept


def json_array(data: bytes) -> None:
    values, broken = [], False
    try:
        for value in json_records.read_array(io.BytesIO(data), lambda count: None):
            values.append(value)
    except json_records.Malformed as error:
        broken = True
        assert 0 <= error.offset <= len(data)
    _each(values, _kept_or_rejected)
    try:
        expected = json.loads(data)
    except (ValueError, RecursionError):
        return
    assert broken == (not isinstance(expected, list)) or data.startswith(b"\xef\xbb\xbf")
    assert broken or len(values) == len(expected)


def json_lines(data: bytes) -> None:
    try:
        for _, value in json_records.read_lines(io.BytesIO(data), lambda count: None):
            _kept_or_rejected(value)
    except json_records.Malformed as error:
        assert 0 <= error.offset <= len(data)


class Bytes:
    """A tokenizer with one id a byte."""

    pad_id, im_start_id, im_end_id, image_id, newline_ids = 0, 1, 2, 3, (14,)
    vocab_size = 260

    def encode(self, text):
        return [4 + byte for byte in text.encode("utf-8", "replace")]

    def decode(self, ids, skip_special=True):
        return bytes(id - 4 for id in ids if id > 3).decode("utf-8", "replace")


def messages(data: bytes) -> None:
    """The text becomes a question, an answer and a system prompt: no text adds a turn or a picture."""
    question, _, rest = data.decode("utf-8", "surrogateescape").partition("\n\n")
    answer, _, system = rest.partition("\n\n")
    turns = [Turn("user", question), Turn("assistant", answer)]
    count = question.count(IMAGE_MARKER) + answer.count(IMAGE_MARKER)
    layouts = [np.arange(1, 4, dtype=np.int32)] * count
    for first in (False, True):
        for mask in chat.LOSS_MASKS:
            try:
                options = {"loss_mask": mask, "system": system, "move_marker_first": first}
                tiles = {"tiles_per_image": [1] * count, "patches": 3}
                found = chat.render(turns, Bytes(), layouts, **tiles, **options)
            except ValueError as error:
                assert IMAGE_MARKER in str(error)
                continue
            assert np.count_nonzero(found.tokens == Bytes.im_start_id) == 2 + bool(system)
            assert np.count_nonzero(found.tokens == Bytes.image_id) == 3 * count
            assert np.count_nonzero(found.image_index >= 0) == 3 * count
            assert not found.trained[found.image_index >= 0].any()
    _, turns, pictures = chat.from_messages([{"role": "user", "content": question or "x"}])
    assert not pictures and IMAGE_MARKER not in turns[0].text


def _members(read, data: bytes, file: str) -> None:
    try:
        for name, offset, size, deflated in read(io.BytesIO(data), Path(file)):
            name.encode()
            if deflated not in archives._FAULTS:
                assert 0 <= offset <= offset + size <= len(data)
                place = archives.Place("a.zip", name, offset, size, deflated)
                if deflated and deflated <= archives.MAX_BYTES:
                    archives._inflated(data[offset : offset + size], place)
    except (ReleaseError, OSError):
        pass


def zip_file(data: bytes) -> None:
    _members(archives.zip_members, data, "a.zip")


def tar_file(data: bytes) -> None:
    _members(archives.tar_members, data, "a.tar")


def picture(data: bytes) -> None:
    for read in (image.header_size, image.check, image.decode):
        try:
            read(data, max_pixels=10_000_000) if read is not image.header_size else read(data)
        except image.ImageError as error:
            assert error.fault


_folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)


def safetensors(data: bytes) -> None:
    file = _folder / "a.safetensors"
    file.write_bytes(data)
    try:
        tensors = TensorFiles(file)
        for name in tensors.names:
            tensor = tensors.tensor(name)
            if tensor.shape:
                assert tensor[:].shape == tensor.shape
    except CheckpointError as error:
        assert "a.safetensors" in str(error)


def weight_index(data: bytes) -> None:
    (_folder / INDEX).write_bytes(data)
    try:
        TensorFiles(_folder)
    except CheckpointError as error:
        assert "safetensors" in str(error)
    except FileNotFoundError:
        pass
    finally:
        (_folder / INDEX).unlink()


def model_config(data: bytes) -> None:
    (_folder / "config.json").write_bytes(data)
    try:
        config_from_folder(_folder)
    except CheckpointError as error:
        assert "config.json" in str(error) or "safetensors" in str(error)


def data_position(data: bytes) -> None:
    try:
        state = parse_json(data)
        feed.check_state(state)
    except (ValueError, feed.RestartError):
        return
    assert state == POSITION, "a changed position passes"


POSITION = {"format": 3, "identity": {"seed": 1}, "batches": 7, "stream": None}
POSITION = json.loads(json.dumps(POSITION | {"counters": feed.Counters().get_state()}))
POSITION |= {"sha256": json_sum(POSITION)}

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        json_array,
        json_lines,
        messages,
        zip_file,
        tar_file,
        picture,
        safetensors,
        weight_index,
        model_config,
        data_position,
    )
}


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.png", b"picture" * 50)
        archive.writestr("c.png", b"stored", zipfile.ZIP_STORED)
    return stream.getvalue()


def _tar(format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name in ("a/b.png", "long/" * 40 + "é.png"):
            info = tarfile.TarInfo(name)
            info.size = 700
            archive.addfile(info, io.BytesIO(bytes(700)))
    return stream.getvalue()


def _picture(format: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def _safetensors() -> bytes:
    tensors = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    tensors |= {"b": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]}}
    header = json.dumps(tensors | {"__metadata__": {"format": "pt"}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(28)


_SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 64}
_TEXT = _SIZES | {"model_type": "qwen2", "vocab_size": 9, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
_CONFIG = {"model_type": "llava_next", "image_grid_pinpoints": [[14, 28]], "text_config": _TEXT}
_CONFIG |= {"vision_config": _SIZES | {"image_size": 14, "patch_size": 7}}

SEEDS: dict[str, list[bytes]] = {
    "json_array": [
        json.dumps([RECORD, RECORD], ensure_ascii=ascii).encode() for ascii in (True, False)
    ],
    "json_lines": [b"\n".join([json.dumps(RECORD).encode()] * 2)],
    "messages": [
        b"<image>\nWhat?\n\nA cat.\n\nYou help.",
        b"a <image> b <image>\n\n<|im_end|>\n\n",
    ],
    "zip_file": [_zip()],
    "tar_file": [_tar(tarfile.PAX_FORMAT), _tar(tarfile.GNU_FORMAT)],
    "picture": [_picture(format) for format in image.FORMATS],
    "safetensors": [_safetensors()],
    "weight_index": [json.dumps({"weight_map": {"a": "a.safetensors"}}).encode()],
    "model_config": [json.dumps(_CONFIG).encode()],
    "data_position": [json.dumps(POSITION, indent=4).encode()],
}
assert SEEDS.keys() == TARGETS.keys()

# Pieces that random bytes would seldom hit.
WORDS = [
    b"<image>",
    b"<ima<image>ge>",
    b"ge>",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"NaN",
    b"1e999",
    b"9" * 30,
    b"-1",
]
WORDS += [b"[" * 300, b'{"a":' * 300, b"null", b"{}", b"[]", b'""', b"\0", b"\xff" * 8, b"..", b"/"]
WORDS += [b"PK\1\2", b"PK\3\4", b"\x80" + bytes(11), b"<|im_start|>", b"\n", b"\n\n", b"\\", b'"']


def changed(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """The seed after some edits: (place, number of bytes to take away, what to put there)."""
    for place, count, piece in edits:
        place %= len(seed) + 1
        seed = seed[:place] + piece + seed[place + count :]
    return seed


def run(name: str, data: bytes) -> None:
    """Runs a target, within bounds."""
    start, before = time.process_time(), _peak()
    TARGETS[name](data)
    assert time.process_time() - start < SECONDS, "too slow"
    assert _peak() - before < MEBIBYTES, "too much memory"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
