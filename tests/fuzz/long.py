"""A long search for inputs that break a target: python -m tests.fuzz.long NAME --runs=1000000 [--seed=N]

It changes the seeds at random. With `--atheris` (pip install atheris) libFuzzer chooses the changes by the code that
they reach. The first finding is written to finding_NAME and ends the search.
"""

import argparse
import random
import sys
from pathlib import Path

from tests.fuzz.targets import SEEDS, TARGETS, WORDS, changed, run


def tried(name: str, data: bytes) -> None:
    try:
        run(name, data)
    except Exception:
        Path(f"finding_{name}").write_bytes(data)
        raise


def search(name: str, runs: int, seed: int) -> None:
    rng = random.Random(seed)

    def edit():
        piece = rng.choice(WORDS) if rng.random() < 0.4 else rng.randbytes(rng.randrange(4))
        return rng.randrange(1 << 12), rng.choice([0, 1, 1, 2, 8, 64]), piece

    for number in range(runs):
        tried(name, changed(rng.choice(SEEDS[name]), [edit() for _ in range(rng.randint(1, 5))]))
        if number % 10_000 == 0:
            print(f"{name}: {number:,} of {runs:,}", flush=True)
    print(f"{name}: {runs:,} inputs, no finding")


def search_with_atheris(name: str, runs: int, seed: int) -> None:
    import atheris

    atheris.instrument_all()
    with_seeds = Path(f"corpus_{name}")
    with_seeds.mkdir(exist_ok=True)
    for number, data in enumerate(SEEDS[name]):
        (with_seeds / f"seed_{number}").write_bytes(data)
    command = [sys.argv[0], str(with_seeds), f"-runs={runs}", f"-seed={seed}"]
    atheris.Setup(command, lambda data: tried(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--atheris", action="store_true")
    arguments = parser.parse_args()
    function = search_with_atheris if arguments.atheris else search
    function(arguments.name, arguments.runs, arguments.seed)
