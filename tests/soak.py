"""A soak of the whole chain: build, train, evaluate, under kills, damage and bad luck.

    python -m tests.soak --seed=1 --kills=20 --damages=12

Each stage first runs undisturbed. Then it runs in another folder and is disturbed. After each disturbance the same
command is run again. In the end the results must be those of the undisturbed run, bit for bit; or a command must have
ended with one sentence that names what is wrong. Then the damage is undone, and the command must go on.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pangea_jax.train.telemetry import CLOCKED, STARTS_FILE

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "train", "evaluate")
STEPS, RECORDS, DOCUMENTS = 40, 120, 40
PATIENCE = 900  # seconds of one command
ATTEMPTS = 20  # kills until there is a file to damage


class Broken(AssertionError):
    """A stage lost something, or said nothing useful."""


@dataclasses.dataclass
class Stage:
    """One command of the chain.

    Attributes:
      command: from the folder of its results to the words of the command.
      results: from that folder to what must be equal, by name.
      read_again: patterns of the files in that folder that a later start reads.
      folder: where it writes.
      seconds: how long its last run took, from the first file that it wrote.
    """

    name: str
    command: Callable[[Path], Sequence[str]]
    results: Callable[[Path], dict[str, str]]
    read_again: Sequence[str]
    folder: Path
    seconds: float = 0.0

    def start(self) -> subprocess.Popen:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, *self.command(self.folder)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def begin(self) -> subprocess.Popen:
        """Starts the command, and waits until it has written into its folder or has ended."""
        since, process = time.time(), self.start()
        while process.poll() is None and not any(changed(self.folder, since)):
            time.sleep(0.02)
        return process

    def finish(self) -> str:
        """Runs the command to its end; "" if it succeeded, else the sentence that it ended with.

        Raises:
          Broken: it ended with a traceback or without a word.
        """
        process, begun = self.begin(), time.monotonic()
        said = process.communicate(timeout=PATIENCE)[1]
        self.seconds = time.monotonic() - begun
        if process.returncode == 0:
            return ""
        lines = [line for line in said.splitlines() if line.strip() and "PANGEA_DEBUG" not in line]
        if "Traceback" in said or not lines or process.returncode < 0:
            raise Broken(f"{self.name} ended with {process.returncode}:\n{said[-3000:]}")
        return lines[-1]


def changed(folder: Path, since: float) -> Iterator[Path]:
    """The files that were written since then."""
    with contextlib.suppress(FileNotFoundError):  # what is renamed or removed meanwhile
        for path in folder.rglob("*"):
            if path.stat().st_mtime >= since and path.is_file():
                yield path


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def built(folder: Path) -> dict[str, str]:
    """The checksums of a store's manifest, each of a file that is there."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: digest((folder / name).read_bytes()) for name in files}


def trained(folder: Path) -> dict[str, str]:
    """Every metric that does not depend on the clock, and the weights."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metrics = [{name: x for name, x in line.items() if name not in CLOCKED} for line in lines]
    weights = (folder / "model" / "model.safetensors").read_bytes()
    return {"metrics": json.dumps(metrics), "weights": digest(weights)}


def evaluated(folder: Path) -> dict[str, str]:
    results = json.loads((folder / "results.json").read_text())
    samples = sorted((folder / "samples").rglob("*.jsonl"))
    kept = ("documents", "failures", "tasks", "scores")
    found = {name: json.dumps(results[name], sort_keys=True) for name in kept if name in results}
    return found | {path.name: digest(path.read_bytes()) for path in samples}


class Chain:
    """The three stages, in folders of `work`."""

    def __init__(self, work: Path, steps: int, model: Path | None = None):
        self.work, self.steps = work, steps
        self.model = model or work / "train"

    def stage(self, name: str) -> Stage:
        return getattr(self, f"_{name}")(self.work / name)

    def _build(self, folder: Path) -> Stage:
        source = f"--source={self.source}"
        words = (
            "launch/build_data.py",
            "pangeains",
            source,
            "--workers=1",
            "--max_bad_fraction=0.5",
        )
        return Stage(
            "build",
            lambda folder: (*words, f"--out={folder}"),
            built,
            ["work/*.json", "work/*/*.json", "work/*/*.parquet", "work/raw/*", "archives.sqlite"],
            folder,
        )

    def _train(self, folder: Path) -> Stage:
        config = f"--config=tests/launch/tiny.py:steps={self.steps}"
        return Stage(
            "train",
            lambda folder: ("launch/train.py", config, f"--workdir={folder}"),
            trained,
            ["config.json", STARTS_FILE, "checkpoints/*/*", "checkpoints/*/*/**/*"],
            folder,
        )

    def _evaluate(self, folder: Path) -> Stage:
        words = ("eval/run.py", "--tasks=xstorycloze_en", f"--data_dir={self.documents}")
        words += (f"--model={self.model}", "--batch_size=2")
        return Stage(
            "evaluate",
            lambda folder: (*words, f"--output_path={folder}"),
            evaluated,
            ["responses/*"],
            folder,
        )

    @functools.cached_property
    def source(self) -> Path:
        """Records with pictures, one of which is damaged."""
        folder = self.work / "source"
        (folder / "a").mkdir(parents=True)
        records = []
        for n in range(RECORDS):
            pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "a" / f"{n}.png")
            turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"{n}"}]
            records.append({"id": f"r{n}", "image": f"a/{n}.png", "conversations": turns})
        (folder / "a" / "7.png").write_bytes(b"no picture")
        text = json.dumps([record | {"language": "en"} for record in records])
        (folder / "PangeaIns.json").write_text(text)
        return folder

    @functools.cached_property
    def documents(self) -> Path:
        file = self.work / "documents" / "xstorycloze" / "en.jsonl"
        file.parent.mkdir(parents=True)
        rows = [
            {
                "id": f"d{n}",
                "sentences": [f"It is {n}."] * 4,
                "endings": ["Yes.", "No."],
                "answer": n % 2,
            }
            for n in range(DOCUMENTS)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file.parents[1]


def kill(stage: Stage, rng: random.Random, seconds: float) -> None:
    """Kills the command at a random moment of its work, which takes this long when it is not disturbed."""
    process = stage.begin()
    time.sleep(rng.random() * seconds)
    process.kill()
    process.communicate()


def damage(stage: Stage, rng: random.Random) -> tuple[str, Callable[[], None]] | None:
    """Damages one file that the next start reads; returns what was done, and a function that undoes it."""
    files = sorted({p for form in stage.read_again for p in stage.folder.glob(form) if p.is_file()})
    files = [path for path in files if path.stat().st_size]
    if not files:
        return None
    file = rng.choice(files)
    content = file.read_bytes()
    kind = rng.choice(["truncated", "flipped", "null", "removed", "folder"])
    if kind == "truncated":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "flipped":
        place = rng.randrange(len(content))
        file.write_bytes(
            content[:place]
            + bytes([content[place] ^ (1 << rng.randrange(8))])
            + content[place + 1 :]
        )
    elif kind == "null":
        file.write_bytes(b"null")
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()

    def undo():
        if file.is_dir():
            shutil.rmtree(file)
        if file.parent.is_dir():
            file.write_bytes(content)

    return f"{file.relative_to(stage.folder)}: {kind}", undo


def set_clock_ahead(stage: Stage) -> None:
    """As if all earlier starts had happened while the clock was a year ahead."""
    ahead = time.time() + 365 * 86400
    for path in stage.folder.rglob("*"):
        if path.is_file():
            os.utime(path, (ahead, ahead))
    starts = stage.folder / STARTS_FILE
    if starts.is_file():
        lines = [json.loads(line) | {"time": ahead} for line in starts.read_text().splitlines()]
        starts.write_text("".join(json.dumps(line) + "\n" for line in lines))


def check(stage: Stage, expected: dict[str, str], what: str) -> None:
    found = stage.results(stage.folder)
    differing = [name for name in expected | found if expected.get(name) != found.get(name)]
    if differing:
        raise Broken(f"{stage.name}, after {what}: other results in {', '.join(differing[:5])}")


def settle(stage: Stage, expected: dict[str, str], what: str, undo=lambda: None) -> None:
    """Finishes the stage after a disturbance. If it refuses with a sentence, the damage is undone first."""
    if said := stage.finish():
        print(f"  {stage.name}: {what}: it says: {said[:200]}", flush=True)
        undo()
        if again := stage.finish():
            raise Broken(f"{stage.name}, after {what} was undone: {again}")
    check(stage, expected, what)


def soak(stage: Stage, expected: dict[str, str], seconds: float, rng, kills: int, damages: int):
    """Kills, then damages between two kills, then a clock that was ahead."""
    for number in range(kills):
        kill(stage, rng, seconds)
        print(f"  {stage.name}: kill {number + 1} of {kills}", flush=True)
    settle(stage, expected, f"{kills} kills")
    for number in range(damages):
        for _ in range(ATTEMPTS):
            shutil.rmtree(stage.folder)
            kill(stage, rng, seconds)
            if done := damage(stage, rng):
                break
        else:
            raise Broken(f"{stage.name} had no file to damage after {ATTEMPTS} kills")
        print(f"  {stage.name}: damage {number + 1} of {damages}: {done[0]}", flush=True)
        settle(stage, expected, *done)
    shutil.rmtree(stage.folder)
    kill(stage, rng, seconds)
    set_clock_ahead(stage)
    settle(stage, expected, "a clock that was ahead")


def starve(stage: Stage, expected: dict[str, str], kibibytes: int) -> bool:
    """Runs the stage on a disk of this size, which is too small, then on one that is read-only.

    Returns:
      whether a file system can be mounted here.
    """
    shutil.rmtree(stage.folder, ignore_errors=True)
    stage.folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "soak", str(stage.folder.parent)]
    if subprocess.run(mount, capture_output=True).returncode:
        return False
    try:
        for options in (None, "remount,ro"):
            if options:
                subprocess.run(["mount", "-o", options, str(stage.folder.parent)], check=True)
            said = stage.finish()
            if not said:
                raise Broken(f"{stage.name} did not notice {options or 'a full disk'}")
            print(f"  {stage.name}: {options or 'full disk'}: it says: {said[:200]}", flush=True)
        subprocess.run(["mount", "-o", "remount,rw,size=2g", str(stage.folder.parent)], check=True)
        settle(stage, expected, "a full disk")
    finally:
        subprocess.run(["umount", "-l", str(stage.folder.parent)], check=False)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20, help="of all stages together")
    parser.add_argument("--damages", type=int, default=12, help="of all stages together")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--no_disk", action="store_true", help="mount no small file system")
    args = parser.parse_args(arguments)
    stages = args.stages.split(",")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        alone = Chain(Path(folder) / "alone", args.steps)
        for place, name in enumerate(stages):
            reference = alone.stage(name)
            if said := reference.finish():
                raise Broken(f"undisturbed, {name} says: {said}")
            seconds = reference.seconds
            expected = reference.results(reference.folder)
            print(f"{name}: {seconds:.1f} s of work, undisturbed", flush=True)
            # The same input, another folder.
            stage = dataclasses.replace(reference, folder=Path(folder) / "disk" / name)
            rng = random.Random(f"{args.seed} {name}")
            share = [len(range(place, n, len(stages))) for n in (args.kills, args.damages)]
            soak(stage, expected, seconds, rng, *share)
            files = [path for path in reference.folder.rglob("*") if path.is_file()]
            half = sum(path.stat().st_size for path in files) >> 11
            if not args.no_disk and not starve(stage, expected, half):
                print(f"  {name}: no full disk here: mounting is not allowed", flush=True)
    print("nothing was lost")


if __name__ == "__main__":
    main()
