"""Pangea-7B at full size on a small machine: write, convert, one forward pass.

    python -m benchmarks.full_size write   --folder=/data/full      # 15.9 GB of random weights, -hf layout
    python -m benchmarks.full_size convert --folder=/data/full      # to Orbax and back, beside a plain copy
    python -m benchmarks.full_size forward --folder=/data/full      # a picture, a question, 8 new tokens
    python -m benchmarks.full_size forward --folder=/data/full --weights=int8     # rounded as they are read

`convert` needs free disk for two more checkpoints and less than 6 GiB of memory. `forward` needs about 20 GiB and JAX
0.12 (earlier versions widen all weights to float32 on a CPU). `--layers` makes a smaller model, to try the script.
"""

import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import psutil
from PIL import Image

import pangea_jax
from benchmarks import peer
from pangea_jax.checkpoints import SpecialTokens, files, huggingface, names
from pangea_jax.checkpoints import config as config_file
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.model import PangeaConfig, quantized
from pangea_jax.sample import emoji
from pangea_jax.work.atomic import write_json

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BLOCK = 2**25
IMAGE, NEW_TOKENS = (640, 480), 8
MAX_GIB = 22


def random_block(random: np.random.Generator, size: int, exponent: int) -> np.ndarray:
    """bfloat16 of random sign and fraction, magnitude in [2^exponent, 2^(exponent + 2)), `exponent` odd.

    Random bits are many times faster than random normals, and the numbers are never infinite.
    """
    bits = np.frombuffer(random.bytes(2 * size), np.uint16) & np.uint16(0x80FF)
    return (bits | np.uint16((exponent + 127) << 7 & 0x7F00)).view(BFLOAT16)


def planned(name: str, shape: tuple[int, ...], random):
    """A tensor of random weights: at the scale of their fan-in, norms at one, everything else small."""
    size = math.prod(shape)
    if "norm" in name and name.endswith("weight"):
        parts = (lambda: np.ones(size, BFLOAT16),)
    else:
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4096
        # Below that scale: magnitudes reach up to four times this, and the exponent's field must be even.
        exponent = 2 * (math.floor(math.log2(fan_in**-0.5)) // 2) - 1
        sizes = [min(BLOCK, size - start) for start in range(0, size, BLOCK)]
        parts = tuple(lambda n=n: random_block(random, n, exponent) for n in sizes)
    return files.Planned(name, shape, BFLOAT16, parts)


def write(folder: Path, config: PangeaConfig):
    """A random checkpoint in the layout of neulab/Pangea-7B-hf."""
    layout = names.LAYOUTS["transformers-4"]
    entries = names.entries(huggingface.shapes_of(config), config, layout)
    random = np.random.Generator(np.random.SFC64(0))
    tensors = [
        planned(name, entry.their_shape, random) for entry in entries for name in entry.names
    ]
    folder.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    files.write(folder, tensors, huggingface.MAX_SHARD_BYTES, threads=1)
    seconds, size = time.perf_counter() - clock, weight_bytes(folder)
    # Random weights work with any vocabulary; this one is in the package.
    tokenizer = load_tokenizer(emoji.DIRECTORY)
    shutil.copy(emoji.DIRECTORY / emoji.TOKENIZER, folder)
    tokens = SpecialTokens.of(tokenizer)
    write_json(folder / "config.json", config_file.to_transformers(config, "bfloat16", tokens))
    print(f"wrote {size / 1e9:.2f} GB in {seconds:.0f} s, {size / 1e6 / seconds:.0f} MB/s")


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def forget(folder: Path):
    """Drops the folder's files from the page cache, so that the next read comes from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path):
    """Copies the files and waits for the disk, for comparison with the conversions."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        with open(file, "rb") as reader, open(target / file.name, "wb") as writer:
            shutil.copyfileobj(reader, writer, 2**24)
            writer.flush()
            os.fsync(writer.fileno())


def timed(name: str, source: Path, target: Path, layout: str | None = None) -> dict:
    """Converts to `layout`, or copies. Returns seconds, MB/s, and the conversion's peak resident memory, which includes
    mapped files."""
    forget(source)
    clock, peak = time.perf_counter(), None
    if layout is None:
        copy(source, target)
    else:
        flags = f"--from={source}", f"--to={target}", f"--format={layout}"
        process = subprocess.Popen([sys.executable, "launch/convert.py", *flags], cwd=peer.ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"launch/convert.py {' '.join(flags)} failed")
        peak = usage.ru_maxrss / 2**20
    seconds = time.perf_counter() - clock
    rate = weight_bytes(source) / 1e6 / seconds
    memory = "" if peak is None else f", peak memory {peak:.2f} GiB"
    print(f"{name:16} {seconds:7.1f} s {rate:7.0f} MB/s{memory}", flush=True)
    return {"seconds": seconds, "mb_per_s": rate, "peak_gib": peak}


def differing(first: Path, second: Path) -> list[str]:
    """Names of the tensors whose bytes differ. They are read block by block."""
    one, two = files.TensorFiles(first), files.TensorFiles(second)
    wrong = sorted(one.names ^ two.names)
    for name in sorted(one.names & two.names):
        a, b = one.tensor(name), two.tensor(name)
        rows = max(1, BLOCK // math.prod(a.shape[1:]))
        same = (a.shape, a.dtype) == (b.shape, b.dtype) and all(
            a[i : i + rows].tobytes() == b[i : i + rows].tobytes()
            for i in range(0, a.shape[0], rows)
        )
        wrong += [] if same else [name]
    return wrong


def convert(folder: Path):
    """Copies the checkpoint, converts it to Orbax and back, and compares every tensor."""
    copied, orbax, back = (folder.with_name(f"{folder.name}-{x}") for x in ("copy", "orbax", "hf"))
    figures = {"plain copy": timed("plain copy", folder, copied)}
    shutil.rmtree(copied)
    figures["to Orbax"] = timed("to Orbax", folder, orbax, "orbax")
    figures["back to hf"] = timed("back to hf", orbax, back, "hf")
    wrong = differing(folder, back)
    shutil.rmtree(orbax)
    shutil.rmtree(back)
    print(json.dumps(figures))
    if wrong:
        sys.exit(f"{len(wrong)} tensors differ: {wrong[:5]}")
    print("every tensor byte-equal")


class Numbers:
    """A tokenizer that decodes ids to numbers, because random weights choose ids that are no words."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids, skip_special=True):
        return "".join(f"{id} " for id in ids)


def end_above_limit():
    """Ends this process if it uses more than `MAX_GIB`, before the machine runs out of memory."""
    me = psutil.Process()
    while me.memory_info().rss < MAX_GIB * 2**30:
        time.sleep(0.1)
    print(f"ended: more than {MAX_GIB} GiB of memory", file=sys.stderr, flush=True)
    os._exit(1)


def forward(folder: Path, weights: str | None = None, image: bool = True):
    """Loads the model and answers a short question about a picture twice; the first time it compiles."""
    forget(folder)
    threading.Thread(target=end_above_limit, daemon=True).start()
    clock = time.perf_counter()
    pangea = pangea_jax.load(folder, weights=weights)
    jax.block_until_ready(jax.live_arrays())
    seconds, size = time.perf_counter() - clock, weight_bytes(folder)
    held = sum(array.nbytes for array in jax.live_arrays()) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"weights {weights or 'as they are'}: {size / 1e9:.2f} GB read in {seconds:.0f} s, {size / 1e6 / seconds:.0f} "
        f"MB/s, {time.process_time():.0f} s of processor time; {held:.2f} GiB held, peak memory {peak:.2f} GiB",
        flush=True,
    )
    pangea.tokenizer = Numbers(pangea.tokenizer)
    pixels = np.random.default_rng(0).integers(0, 256, (*IMAGE[::-1], 3), np.uint8)
    content = [
        *([{"type": "image", "image": Image.fromarray(pixels)}] if image else []),
        {"type": "text", "text": "What is this?"},
    ]
    for run in ("compiling", "compiled"):
        clock, times, ids = time.perf_counter(), [], ""
        messages = [{"role": "user", "content": content}]
        for piece in pangea.stream(messages, max_new_tokens=NEW_TOKENS, stop=()):
            times.append(time.perf_counter() - clock)
            ids += piece
        token = (times[-1] - times[0]) / (len(times) - 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{run}: first token after {times[0]:.1f} s, {token:.2f} s a further token, "
            f"peak memory {peak:.2f} GiB; ids {ids}",
            flush=True,
        )


def main():
    parser = peer.parser(__doc__)
    parser.add_argument("phase", choices=("write", "convert", "forward"))
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint lies")
    parser.add_argument("--layers", type=int, default=28, help="of the decoder (write)")
    parser.add_argument("--weights", choices=quantized.FORMS, help="8 or 4 bits (forward)")
    parser.add_argument("--text", action="store_true", help="no picture (forward)")
    args = parser.parse_args()
    print(peer.machine())
    folder, config = args.folder.absolute(), PangeaConfig()
    if args.phase == "write":
        language = dataclasses.replace(config.language, layers=args.layers)
        write(folder, dataclasses.replace(config, language=language))
    elif args.phase == "convert":
        convert(folder)
    else:
        forward(folder, args.weights, not args.text)


if __name__ == "__main__":
    main()
