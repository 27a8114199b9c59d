"""Compiles a config's training step for TPUs on a machine without TPUs: does it fit, and what does it communicate?

    pip install -r requirements-tpu-aot.txt
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v5p:4x4x4
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v5e:4x4 --json \\
        --config.pipeline.rows=16 --config.keep=attention
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v5e:8x8 --search
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v5e:4x4 --slices=2 --config.mesh.data=2
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v5e:4x4 --steps=N --output=step.zip
    python launch/compile.py --config=configs/pangea_7b_finetune.py --topology=v6e:1x1 --program=generate --rows=16

The step is the one that launch/train.py runs, with the same model, optimiser, shardings and batch. The compiler of the
TPU (libtpu) compiles it from shapes alone. This initialises nothing and needs about 3 GiB of memory. The TPUs use the
same compiler, so a step that fits here also fits there. Topologies are those of `jax.experimental.topologies`:
v5e:2x4, v5p:2x2x2, v6e:4x4, ... With several `--slices`, only the axis `data` of the mesh uses the data centre network.
cpu:8 stands for 8 devices on the processor of this machine.

The time of a step is an estimate from the compiled program and the published rates of the chip
(`pangea_jax/train/roofline.py`). It is a lower bound, to compare settings with.

`--search` finds the number of rows per chip and the value of `keep` that fit and take least time for a row, by that
estimate. It tries the largest number of rows and half of it.
`--output` keeps the program for `launch/train.py --executable`.

`--program=generate` compiles what an evaluation runs instead: to read a prompt of `--tokens` tokens and `--tiles`
tiles, to move it into the batch, and to decode `--rows` rows. The mesh is that of one host, as eval/run.py makes it:
hosts share documents out, and no program spans them.
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

# JAX reads it when it is loaded: nothing is run.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from absl import flags

from launch import common, executable
from pangea_jax import experiment, sharding, topologies
from pangea_jax.experiment import Experiment
from pangea_jax.generate import footprint
from pangea_jax.generate.engine import choose_mesh
from pangea_jax.model import PangeaConfig
from pangea_jax.train import hlo, roofline
from pangea_jax.train import optimizer as optim
from pangea_jax.train.state import abstract_state
from pangea_jax.work import paths

CONFIG = common.define_config("configs/pangea_7b_finetune.py")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "TPUs to compile for, GENERATION:SHAPE.")
SLICES = flags.DEFINE_integer("slices", 1, "Number of slices, joined by the data centre network.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.")
SEARCH = flags.DEFINE_bool(
    "search", False, "Find the rows per chip and the keep with the least time for a row."
)

PROGRAM = flags.DEFINE_enum(
    "program", "train", ["train", "generate"], "What to compile: the training step, or answering."
)
ANSWERING = {  # of --program=generate
    "rows": flags.DEFINE_integer("rows", 16, "Answers at once, on one host.", 1),
    "tokens": flags.DEFINE_integer("tokens", 4096, "Tokens of the longest prompt.", 1),
    "tiles": flags.DEFINE_integer("tiles", 5, "Tiles of the longest prompt.", 0),
    "new_tokens": flags.DEFINE_integer("new_tokens", 512, "Slots for an answer.", 1),
}
OUTPUT = flags.DEFINE_string("output", None, "File to write the program to, for launch/train.py.")
STEPS = flags.DEFINE_integer(
    "steps", None, "Steps of the run, for --output: the schedule is part of the program."
)

# Each value keeps more and recomputes less than the one before. "offload" is not in this order: it recomputes as much
# as "qkv", and copies to the host during the computation.
KEEPING_MORE = ("attention", "qkv", "products")
SCHEDULE_STEPS = 1000  # part of the program, but no measurement depends on it


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
    mesh, hbm = topologies.make_mesh(topology, slices, exp.mesh)
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
        found |= {"collective_bytes": None, "dcn_bytes": None, "estimate": None}
    else:
        found |= _read(compiled, hbm)
        found["estimate"] = _estimate(compiled, topology, mesh, slices, exp, flops)
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
    peak = usage.peak_memory_in_bytes / topologies.GIB
    return {
        "peak_hbm_gib": round(peak, 2),
        "host_gib": round(usage.host_temp_size_in_bytes / topologies.GIB, 2),
        "fits": peak <= hbm,
        "collective_bytes": hlo.collective_bytes(text),
        "dcn_bytes": hlo.dcn_bytes(text),
    }


def _estimate(compiled, topology: str, mesh, slices: int, exp: Experiment, flops) -> dict | None:
    """`roofline.step_time` on the chips of a slice; None for a processor, whose rates are not known here."""
    chip = roofline.CHIPS.get(topology.partition(":")[0])
    if chip is None:
        return None
    # The decoder's attention is a Pallas kernel. Its forward pass, a third, may run again.
    again = 4 / 3 if exp.keep == "none" else 1
    kernels = again * flops["attention"] / mesh.size
    return roofline.step_time(compiled.as_text(), chip, mesh.size // slices, kernels)


def _needed_gib(message: str) -> float | None:
    """The GiB that a program needs, at least for its temporary arrays, from the compiler's out-of-memory message.

    Another message gives None.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    used = used or re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    return used and round(float(used[1]) * 1024 ** ("KMGT".index(used[2]) - 2), 2)


def measure_answering(model: PangeaConfig, topology: str, sizes: Mapping[str, int]) -> dict:
    """Compiles the programs of an evaluation on the chips of one host, and measures their memory.

    Args:
      sizes: `rows`, `tokens`, `tiles`, `new_tokens` of `footprint.lower`.
    """
    slice_mesh, hbm = topologies.make_mesh(topology, 1, sharding.MeshConfig())
    chips = [d for d in slice_mesh.devices.flat if d.process_index == 0]
    mesh = choose_mesh("auto", model, devices=chips) or sharding.make_mesh(devices=chips)
    found = {"topology": topology, "chips": mesh.size, "mesh": dict(mesh.shape), **sizes}
    found |= {"hbm_gib": hbm, "counted_gib": footprint.counted(model, mesh, **sizes)}
    found["peak_hbm_gib"], found["compile_s"] = {}, {}
    for name, lowered in footprint.lower(model, mesh, **sizes).items():
        start = time.perf_counter()
        found["peak_hbm_gib"][name] = _peak_gib(lowered)
        found["compile_s"][name] = round(time.perf_counter() - start, 1)
    return found | {"fits": max(found["peak_hbm_gib"].values()) <= hbm}


def _peak_gib(lowered) -> float:
    try:
        return round(lowered.compile().memory_analysis().peak_memory_in_bytes / topologies.GIB, 2)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed_gib(str(error))
        if needed is None:
            raise
        return needed


def describe_answering(found: dict) -> str:
    """The measurement of `--program=generate` as text."""
    lines = [
        f"{found['topology']}, a host of {found['chips']} chips, mesh {found['mesh']}: {found['rows']} rows of "
        f"{found['tokens']:,} + {found['new_tokens']} tokens, {found['tiles']} tiles, "
        + ("fits" if found["fits"] else "DOES NOT FIT"),
        f"of {found['hbm_gib']:.2f} GiB a chip; counted: "
        + ", ".join(f"{name} {size:.2f}" for name, size in found["counted_gib"].items()),
    ]
    for name, peak in found["peak_hbm_gib"].items():
        lines.append(f"  {name:8} {peak:6.2f} GiB ({found['compile_s'][name]:.0f} s)")
    return "\n".join(lines)


def search(exp: Experiment, topology: str, slices: int = 1) -> dict:
    """The measurement with the least estimated time for a row, among rows per shard and values of `keep` that fit.

    Raises:
      UserError: one row per shard does not fit, or the rates of the chip are not known.
    """
    mesh, _ = topologies.make_mesh(topology, slices, exp.mesh)
    shards, fitting = sharding.row_shards(mesh), []

    def attempt(rows, keep) -> bool:
        shape = dataclasses.replace(exp.pipeline, rows=rows * shards)
        tried = dataclasses.replace(exp, pipeline=shape, keep=keep, accumulation=1)
        found = measure(tried, topology, slices)
        print(one_line(found), file=sys.stderr)
        if found["fits"]:
            fitting.append(found)
            return True
        if (rows, keep) == (1, "none"):
            raise common.UserError(
                f"one row of {exp.pipeline.row_tokens} tokens per shard does not fit {topology}: "
                f'{found["peak_hbm_gib"]:.1f} of {found["hbm_gib"]:.2f} GiB with keep "none"; '
                "choose more chips"
            )
        return False

    attempt(1, "none")
    if fitting[0]["estimate"] is None:
        raise common.UserError(f"--search compares times, but the rates of {topology} are unknown")
    most, too_many = 1, None
    while too_many != most + 1:
        rows = (most + too_many) // 2 if too_many else 2 * most
        if attempt(rows, "none"):
            most = rows
        else:
            too_many = rows
    for rows in dict.fromkeys((most, max(1, most // 2))):
        kept = next((i for i, keep in enumerate(KEEPING_MORE) if not attempt(rows, keep)), None)
        if kept in (0, 1):  # "qkv" does not fit on the chip
            attempt(rows, "offload")
    return min(fitting, key=lambda found: found["estimate"]["step_s"] / found["rows_per_shard"])


def one_line(found: dict) -> str:
    return (
        f"{found['topology']}, {found['rows_per_shard']} rows of {found['row_tokens']} tokens per shard, "
        f"keep {found['keep']}: {found['peak_hbm_gib']:.2f} of {found['hbm_gib']:.2f} GiB, "
        f"{'fits' if found['fits'] else 'DOES NOT FIT'}{_seconds(found)} ({found['compile_s']:.0f} s)"
    )


def _seconds(found: dict) -> str:
    estimate = found["estimate"]
    return f", {estimate['step_s']:.3f} s by estimate" if estimate else ""


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
    if estimate := found["estimate"]:
        mfu = found["model_flops_per_step"] / found["chips"] / estimate["step_s"]
        mfu /= roofline.CHIPS[found["topology"].partition(":")[0]].flops
        lines.append(
            f"time         {estimate['step_s']:.3f} s a step at least, by estimate: {estimate['work_s']:.3f} "
            f"computing, {estimate['wait_s']:.3f} waiting for collectives; {estimate['hidden_s']:.3f} of transfers "
            f"beside; so MFU is at most {mfu:.0%}"
        )
    if found["collective_bytes"] is not None:
        lines.append("collectives  GiB per chip and step")
        for kind, size in found["collective_bytes"].items():
            lines.append(f"  {kind:20} {size / topologies.GIB:8.2f}")
        for kind, size in found["dcn_bytes"].items():
            lines.append(f"  {kind + ', DCN':20} {size / topologies.GIB:8.2f}")
    return "\n".join(lines)


def main(argv):
    common.no_arguments(argv)
    # A program from the compile cache has no compile time, and XLA cannot serialise it again.
    jax.config.update("jax_enable_compilation_cache", False)
    exp = CONFIG()
    if PROGRAM.value == "generate":
        if SEARCH.value or OUTPUT.value or SLICES.value != 1:
            raise common.UserError(
                "--program=generate excludes --search, --output and --slices: hosts answer alone"
            )
        sizes = {name: flag.value for name, flag in ANSWERING.items()}
        found = measure_answering(exp.model, TOPOLOGY.value, sizes)
        print(json.dumps(found) if JSON.value else describe_answering(found))
        return
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
