"""Measures how long the main command takes on this machine, and its phases.

    python -m benchmarks.sample_run [--config=configs/ablate_en_ratio.py] [--cold]

Runs `launch/train.py` in its own process with a new work directory. With `--cold` the caches of compiled programs and
of picture features are new too. Prints the machine, wall time, time to the first log line, peak memory, examples per
second and the share of each phase.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import peer


def run(config: str, cold: bool, overrides: list[str]) -> dict:
    """Times one run and returns the printed figures."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if cold:
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
            environment["XDG_CACHE_HOME"] = f"{folder}/cache"
        workdir = Path(folder) / "run"
        command = [sys.executable, "launch/train.py", f"--config={config}", f"--workdir={workdir}"]
        started, clock = time.time(), time.perf_counter()
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run([*command, *overrides], cwd=peer.ROOT, env=environment, **quiet)
        wall = time.perf_counter() - clock
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        results = json.loads((workdir / "results.json").read_text())
        rates = sorted(line["examples_per_second"] for line in lines[1:])
        return {
            "wall_s": wall,
            "first_log_s": lines[0]["time"] - started,
            "peak_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
            "examples_per_s": rates[len(rates) // 2] if rates else lines[0]["examples_per_second"],
            "timing": results["timing"],
        }


def main():
    parser = peer.parser(__doc__)
    parser.add_argument("--config", default="configs/ablate_en_ratio.py")
    parser.add_argument("--cold", action="store_true", help="with empty caches")
    args, overrides = parser.parse_known_args()
    figures = run(args.config, args.cold, overrides)
    print(peer.machine())
    print(f"{args.config} {' '.join(overrides)}{' (cold caches)' if args.cold else ''}")
    print(f"wall time         {figures['wall_s']:8.1f} s")
    print(f"to the first log  {figures['first_log_s']:8.1f} s")
    print(f"peak memory       {figures['peak_gib']:8.2f} GiB")
    print(f"median rate       {figures['examples_per_s']:8.0f} examples/s")
    for phase, spent in figures["timing"].items():
        print(f"{phase:17} {spent['seconds']:8.1f} s {spent['share']:7.1%}")


if __name__ == "__main__":
    main()
