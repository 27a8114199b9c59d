"""Compiles a config's training step for TPUs on a machine without TPUs: does it fit, and what does it communicate?

    pip install -r requirements-tpu-aot.txt
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v5p:4x4x4
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v5e:4x4 --json \\
        --config.pipeline.rows=16 --config.keep=attention
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v5e:8x8 --search
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v5e:4x4 --slices=2 --config.mesh.data=2
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v5e:4x4 --steps=N --output=step.zip

The step is the one that launch/train.py runs, with the same model, optimiser, shardings and batch. The compiler of the
TPU (libtpu) compiles it from shapes alone. This initialises nothing and needs about 3 GiB of memory. The TPUs use the
same compiler, so a step that fits here also fits there. Topologies are those of `jax.experimental.topologies`:
v5e:2x4, v5p:2x2x2, v6e:4x4, ... With several `--slices`, only the axis `data` of the mesh uses the data centre network.
cpu:8 stands for 8 devices on the processor of this machine.

`--search` finds the largest number of rows per chip that fits, and then the value of `keep` that recomputes least.
`--output` keeps the program for `launch/train.py --executable`.
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

# JAX and libtpu read these variables when they are loaded. They make libtpu work on a machine that is no TPU host: it
# asks no metadata server and locks no device.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
from absl import flags
from jax.experimental import topologies

from launch import common, executable
from pangea_jax import experiment, sharding
from pangea_jax.experiment import Experiment
from pangea_jax.train import hlo
from pangea_jax.train import optimizer as optim
from pangea_jax.train.state import abstract_state
from pangea_jax.work import paths

CONFIG = common.define_config("configs/pangea_7b_finetune.py")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "TPUs to compile for, GENERATION:SHAPE.")
SLICES = flags.DEFINE_integer("slices", 1, "Number of slices, joined by the data centre network.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.")
SEARCH = flags.DEFINE_bool("search", False, "Find the most rows per chip, and the cheapest keep.")

OUTPUT = flags.DEFINE_string("output", None, "File to write the program to, for launch/train.py.")
STEPS = flags.DEFINE_integer(
    "steps", None, "Steps of the run, for --output: the schedule is part of the program."
)

GIB = 2**30
# The memory that the compiler lets a program use, out of the 16, 95 and 32 GB of a chip.
HBM_GIB = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
# Each value keeps more and recomputes less than the one before. "offload" is not in this order: it recomputes as much
# as "qkv", and copies to the host during the computation.
KEEPING_MORE = ("attention", "qkv", "products")
SCHEDULE_STEPS = 1000  # part of the program, but no measurement depends on it


def topology_mesh(name: str, slices: int, sizes) -> tuple[jax.sharding.Mesh, float]:
    """The mesh `config.mesh` on the chips of a topology, and the memory of a chip in GiB.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    generation, _, shape = name.partition(":")
    if generation == "cpu" and shape.isdecimal() and slices == 1:
        jax.config.update("jax_num_cpu_devices", int(shape))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        return sharding.make_mesh(**dataclasses.asdict(sizes)), round(memory / int(shape), 2)
    if generation not in HBM_GIB:
        raise common.UserError(
            f"--topology={name}: expected one of {', '.join(HBM_GIB)} with a shape, as in v5e:4x4; or cpu:8"
        )
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise common.UserError(
            "the TPU compiler is in libtpu, which is not installed: pip install -r requirements-tpu-aot.txt"
        ) from None
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=slices
        )
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise common.UserError(f"--topology={name}: libtpu says {error}") from None
    mesh = sharding.make_mesh(**dataclasses.asdict(sizes), devices=topology.devices)
    return mesh, HBM_GIB[generation]


def lower(exp: Experiment, mesh, steps):
    """The lowered step and its model FLOPs."""
    optimizer = optim.make_optimizer(exp.optimizer, steps)
    graphdef, state, shardings = abstract_state(exp.model, optimizer, mesh, frozen=exp.frozen)
    step = experiment.make_step(exp, graphdef, optimizer, shardings, mesh)
    batch = experiment.batch_shapes(exp, mesh)
    flops = experiment.step_flops(exp, state.params, len(batch))
    return step.lower(state, batch), flops


def _prepare(output: Path) -> None:
    """Removes the program of an earlier call, and checks before a long compilation that the file can be written.

    Raises:
      UserError: it cannot be written.
    """
    try:
        paths.make_folder(output.parent)
        output.unlink(missing_ok=True)
        if not paths.is_remote(output) and not os.access(output.parent, os.W_OK):
            raise PermissionError(f"{output.parent} is not writable")
    except OSError as error:
        raise common.UserError(f"--output={output} cannot be written: {error}") from None


def measure(
    exp: Experiment, topology: str, slices: int = 1, output: str | None = None, steps=None
) -> dict:
    """Compiles the step and measures the program. The result can be written as JSON.

    The communication of a program that does not fit is None.

    Args:
      output: file to write the program to.
      steps: number of steps of the run; `output` needs it.
    """
    mesh, hbm = topology_mesh(topology, slices, exp.mesh)
    shards = sharding.row_shards(mesh)
    lowered, flops = lower(exp, mesh, steps or SCHEDULE_STEPS)
    found = {
        "topology": topology,
        "slices": slices,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "row_tokens": exp.pipeline.row_tokens,
        "rows_per_shard": math.ceil(exp.pipeline.rows / shards),
        "keep": exp.keep,
        "accumulation": exp.accumulation,
        "hbm_gib": hbm,
    }
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed_gib(str(error))
        if needed is None:
            raise
        found |= {"peak_hbm_gib": needed, "host_gib": None, "fits": False}
        found |= {"collective_bytes": None, "dcn_bytes": None}
    else:
        found |= _read(compiled, hbm)
        if output and found["fits"]:
            executable.save(common.folder(output, "--output"), lowered, compiled, mesh, exp, steps)
    return found | {
        "compile_s": round(time.perf_counter() - start, 1),
        "model_flops_per_step": flops["total"],
        "model_flops": flops,
    }


def _read(compiled, hbm) -> dict:
    """Memory and communication of a program."""
    usage, text = compiled.memory_analysis(), compiled.as_text()
    peak = usage.peak_memory_in_bytes / GIB
    return {
        "peak_hbm_gib": round(peak, 2),
        "host_gib": round(usage.host_temp_size_in_bytes / GIB, 2),
        "fits": peak <= hbm,
        "collective_bytes": hlo.collective_bytes(text),
        "dcn_bytes": hlo.dcn_bytes(text),
    }


def _needed_gib(message: str) -> float | None:
    """The GiB that a program needs, at least for its temporary arrays, from the compiler's out-of-memory message.

    Another message gives None.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    used = used or re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    return used and round(float(used[1]) * 1024 ** ("KMGT".index(used[2]) - 2), 2)


def search(exp: Experiment, topology: str, slices: int = 1) -> dict:
    """The measurement with the most rows per shard that fit, and with the value of `keep` that recomputes least.

    Raises:
      UserError: one row per shard does not fit.
    """
    mesh, _ = topology_mesh(topology, slices, exp.mesh)
    shards = sharding.row_shards(mesh)

    def attempt(rows, keep):
        shape = dataclasses.replace(exp.pipeline, rows=rows * shards)
        tried = dataclasses.replace(exp, pipeline=shape, keep=keep, accumulation=1)
        found = measure(tried, topology, slices)
        print(one_line(found), file=sys.stderr)
        return found

    best = attempt(1, "none")
    if not best["fits"]:
        raise common.UserError(
            f"one row of {exp.pipeline.row_tokens} tokens per shard does not fit {topology}: "
            f'{best["peak_hbm_gib"]:.1f} of {best["hbm_gib"]:.2f} GiB with keep "none"; '
            "choose more chips"
        )
    too_many = None
    while too_many != (fit := best["rows_per_shard"]) + 1:
        found = attempt((fit + too_many) // 2 if too_many else 2 * fit, "none")
        if found["fits"]:
            best = found
        else:
            too_many = found["rows_per_shard"]
    for keep in KEEPING_MORE:
        found = attempt(fit, keep)
        if not found["fits"]:
            break
        best = found
    if best["keep"] in ("none", "attention"):
        found = attempt(fit, "offload")
        best = found if found["fits"] else best
    return best


def one_line(found: dict) -> str:
    return (
        f"{found['topology']}, {found['rows_per_shard']} rows of {found['row_tokens']} tokens per shard, "
        f"keep {found['keep']}: {found['peak_hbm_gib']:.2f} of {found['hbm_gib']:.2f} GiB, "
        f"{'fits' if found['fits'] else 'DOES NOT FIT'} ({found['compile_s']:.0f} s)"
    )


def describe(found: dict) -> str:
    """The measurement as text."""
    lines = [one_line(found), f"chips        {found['chips']}, mesh {found['mesh']}"]
    if found["host_gib"]:
        lines.append(f"host memory  {found['host_gib']:.2f} GiB per chip")
    parts = ", ".join(
        f"{name} {flops / found['model_flops_per_step']:.1%}"
        for name, flops in found["model_flops"].items()
        if name != "total"
    )
    lines.append(f"model FLOPs  {found['model_flops_per_step']:.3e} per step ({parts})")
    if found["collective_bytes"] is not None:
        lines.append("collectives  GiB per chip and step")
        for kind, size in found["collective_bytes"].items():
            lines.append(f"  {kind:20} {size / GIB:8.2f}")
        for kind, size in found["dcn_bytes"].items():
            lines.append(f"  {kind + ', DCN':20} {size / GIB:8.2f}")
    return "\n".join(lines)


def main(argv):
    common.no_arguments(argv)
    # A program from the compile cache has no compile time, and XLA cannot serialise it again.
    jax.config.update("jax_enable_compilation_cache", False)
    exp = CONFIG()
    steps = STEPS.value or exp.steps
    if OUTPUT.value and (SEARCH.value or not steps):
        raise common.UserError(
            "--output needs --steps=N, the steps of the run, and excludes --search: the schedule of the "
            "learning rate is part of the program"
        )
    if OUTPUT.value:
        _prepare(common.folder(OUTPUT.value, "--output"))
    if SEARCH.value:
        found = search(exp, TOPOLOGY.value, SLICES.value)
    else:
        found = measure(exp, TOPOLOGY.value, SLICES.value, OUTPUT.value, steps)
    print(json.dumps(found) if JSON.value else describe(found))
    if OUTPUT.value and not found["fits"]:
        raise common.UserError(
            f"the program does not fit {TOPOLOGY.value}, and {OUTPUT.value} was not written; choose more "
            "chips, fewer rows, or a value of config.keep that keeps less"
        )


if __name__ == "__main__":
    common.run(main)
