"""A small PangeaIns as it is released, and builds of it that are killed."""

import hashlib
import io
import json

import numpy as np
from PIL import Image

from pangea_jax.data.build import pangeains
from pangea_jax.data.build.pangeains import Build
from pangea_jax.work.runners import Local


def encoded(image, format="JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(width, height, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def record(id, image=None, question="<image>\nWhat is this?", answer="A cat.", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    fields = {"id": id, "conversations": turns, "language": "en"} | fields
    return fields | ({"image": image} if image else {})


def write_source(folder, records, pictures):
    for name, data in pictures.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "PangeaIns.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def make(source, out, max_bad_fraction=0.0, **options):
    with Local(1) as run:
        build = Build(source, out, **options)
        return pangeains.build(build, run, max_bad_fraction=max_bad_fraction)


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != pangeains.ARCHIVES
    }


# Twenty records in five chunks; every second one shares its picture with the one before.
PICTURES = {f"general/set/{n}.jpg": encoded(noise(40 + n, 30, n)) for n in range(10)}
RECORDS = [
    record(f"r{n}", f"general/set/{n // 2}.jpg", language=("en", "sw")[n % 2]) for n in range(18)
] + [
    record("NuminaMath_1", question="2+2?", answer="4"),
    record("two", ["general/set/1.jpg", "general/set/9.jpg"], "<image> <image>?"),
]
SMALL = {"records_per_shard": 4, "shard_bytes": 5_000}


class Killed(BaseException):
    """Nothing that is written for errors catches it."""


class KilledAfter:
    """Runs like `Local(1)`, and is killed after some items, in the middle of writing the next."""

    def __init__(self, items, build):
        self.left, self.build = items, build

    def __call__(self, function, items):
        for item in items:
            if not self.left:
                for path in self.build.work.iterdir():
                    if path.is_dir():
                        (path / "00001.half.partial").write_bytes(b"half")
                raise Killed
            self.left -= 1
            function(item)
            yield item
