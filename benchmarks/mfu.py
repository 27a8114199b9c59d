"""Real training steps of a config on the devices at hand: seconds, tokens a second, MFU, memory.

    python -m benchmarks.mfu --config=configs/pangea_7b_finetune.py:lora=16 --config.pipeline.rows=2 \\
        --config.accumulation=1
    python -m benchmarks.mfu --config=configs/pangea_7b_finetune.py --config.optimizer.name=adafactor \\
        --config.pipeline.rows=2 --config.keep=products
    python -m benchmarks.mfu --config=configs/ablate_en_ratio.py --steps=5        # a smoke test on a CPU

It runs the same step as launch/train.py, with the same model, optimiser, shardings and batch shapes. The weights are
random. There is one batch with random tokens: full rows of conversations as long as those of PangeaIns, each with an
equal share of the tiles. The time does not include data loading, checkpoints and logging. See
pangea_jax/train/flops.py for how FLOPs are counted.
"""

import collections
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from launch import common
from pangea_jax import experiment, sharding
from pangea_jax.batch import Batch
from pangea_jax.experiment import Experiment
from pangea_jax.train import optimizer as optim
from pangea_jax.train.flops import PEAK_FLOPS
from pangea_jax.train.state import init_state

CONFIG = common.define_config("configs/pangea_7b_finetune.py")
STEPS = flags.DEFINE_integer("steps", 10, "Timed steps.", lower_bound=1)
PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "Folder for a trace of two more steps; the kernels that took longest are printed.",
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.")

GIB = 2**30
# Mean tokens and share of trained tokens of the 135 records in the released sample of PangeaIns.
CONVERSATION_TOKENS, TRAINED_SHARE = 2222, 0.15
PANGEAINS_CONVERSATIONS = 6_150_624


def make_batch(exp: Experiment, mesh: jax.sharding.Mesh) -> Batch:
    """Full rows of equally long conversations: first a picture, with an equal share of the tiles, then words."""
    shapes, model = experiment.batch_shapes(exp, mesh), exp.model
    rng = np.random.default_rng(0)
    rows, T = shapes.tokens.shape
    segments = max(1, round(T / CONVERSATION_TOKENS))
    bounds = np.linspace(0, T, segments + 1).astype(int)
    ids = np.repeat(np.arange(1, segments + 1), np.diff(bounds))
    positions = np.arange(T) - bounds[ids - 1]
    pictures = shapes.pictures
    tiles = pictures.shape[1] // segments
    features = min(tiles * model.vision.patches, T // segments * 3 // 4)
    offset = (ids - 1) * tiles * model.vision.patches
    index = np.where(positions < features, 1 + offset + positions, -1)
    tokens = rng.integers(0, model.language.vocab_size, (rows, T), dtype=np.int32)
    trained = (index < 0) & (rng.random(T) < TRAINED_SHARE)
    limit = exp.pipeline.max_targets or T
    trained &= np.cumsum(trained) <= limit
    rows_of = lambda x, dtype: np.broadcast_to(x.astype(dtype), (rows, T))  # noqa: E731
    batch = Batch(
        tokens=tokens,
        image_index=rows_of(index, np.int32),
        positions=rows_of(positions, np.int32),
        segment_ids=rows_of(ids, np.int32),
        targets=np.roll(tokens, -1, axis=1),
        weights=rows_of(trained, np.float32),
    )
    if shapes.features is None:
        return dataclasses.replace(batch, tiles=rng.integers(0, 256, pictures.shape, np.uint8))
    features = rng.standard_normal(pictures.shape, np.float32).astype(model.dtype)
    return dataclasses.replace(batch, features=features)


def longest_kernels(folder: str, count: int = 25) -> list[tuple[str, float, int]]:
    """(name, share of the device's busy time, calls) of the slowest kernels in a trace."""
    file = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    spent, calls = collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines if plane.name.startswith("/device:") else ():
            if line.name.startswith(("Stream", "XLA Ops")):
                for event in line.events:
                    spent[event.name] += event.duration_ns
                    calls[event.name] += 1
    busy = sum(spent.values())
    return [(name, ns / busy, calls[name]) for name, ns in spent.most_common(count)]


def time_steps(step, state, batch, steps: int, profile: str | None) -> dict:
    """Compiles the step, warms it up with two steps, and times the next ones one by one."""
    start = time.perf_counter()
    step = step.lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    seconds, losses = [], []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    kernels = []
    if profile:
        with jax.profiler.trace(profile):
            for _ in range(2):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
        kernels = longest_kernels(profile)
    return {
        "compile_s": round(compile_s, 1),
        "step_s": statistics.median(seconds[2:]),
        "fastest_step_s": min(seconds[2:]),
        "losses": [losses[0], losses[-1]],
        "kernels": kernels,
    }


def measure(exp: Experiment, steps: int, profile: str | None = None) -> dict:
    """The measurements of a config, as a dict that JSON can hold."""
    mesh = sharding.make_mesh(**dataclasses.asdict(exp.mesh))
    optimizer = optim.make_optimizer(exp.optimizer, 1000)
    graphdef, state, shardings = init_state(exp.model, optimizer, mesh, seed=0, frozen=exp.frozen)
    step = experiment.make_step(exp, graphdef, optimizer, shardings, mesh)
    batch = make_batch(exp, mesh).place(mesh)
    rows, T = batch.tokens.shape
    flops = experiment.step_flops(exp, state.params, rows)
    counts = {
        name: sum(value.size for value in part.values())
        for name, part in (("trained", state.trainable), ("frozen", state.frozen))
    }
    timing = time_steps(step, state, batch, steps, profile)
    device = mesh.devices.flat[0]
    peak, memory = PEAK_FLOPS.get(device.device_kind), device.memory_stats() or {}
    rate = flops["total"] / timing["step_s"] / mesh.size
    tokens_per_s = rows * T / timing["step_s"]
    epoch_s = PANGEAINS_CONVERSATIONS * CONVERSATION_TOKENS / tokens_per_s
    return timing | {
        "device": device.device_kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "parameters": counts,
        "rows": rows,
        "row_tokens": T,
        "tiles": 0 if batch.tiles is None else rows * exp.pipeline.row_tiles,
        "optimizer": exp.optimizer.name,
        "keep": exp.keep,
        "tokens_per_s": tokens_per_s,
        "model_flops": flops,
        "tflops_per_device": rate / 1e12,
        "mfu": peak and rate / peak,
        "peak_memory_gib": memory.get("peak_bytes_in_use", 0) / GIB or None,
        "pangeains_device_hours": epoch_s * mesh.size / 3600,
    }


def describe(found: dict) -> str:
    """The measurements as text."""
    millions = {name: f"{count / 1e6:,.1f}M {name}" for name, count in found["parameters"].items()}
    parts = ", ".join(
        f"{name} {flops / found['model_flops']['total']:.1%}"
        for name, flops in found["model_flops"].items()
        if name != "total"
    )
    mfu = f"{found['mfu']:.1%}" if found["mfu"] else "unknown (no peak for this device)"
    memory = found["peak_memory_gib"]
    return "\n".join(
        (
            f"device    {found['devices']} x {found['device']}, JAX {found['jax']}",
            f"model     {millions['trained']}, {millions['frozen']}; {found['optimizer']}, "
            f"keep {found['keep']}",
            f"batch     {found['rows']} rows of {found['row_tokens']} tokens, {found['tiles']} tiles",
            f"step      {found['step_s'] * 1e3:,.1f} ms (median), compiled in {found['compile_s']:.0f} s",
            f"rate      {found['tokens_per_s']:,.0f} tokens/s, {found['tflops_per_device']:,.1f} TFLOP/s a device",
            f"FLOPs     {found['model_flops']['total']:.3e} a step ({parts})",
            f"MFU       {mfu}",
            f"memory    {f'{memory:.1f} GiB at most' if memory else 'unknown on this device'}",
            f"PangeaIns {found['pangeains_device_hours']:,.0f} device hours for one epoch at this rate",
            f"loss      {found['losses'][0]:.3f} at first, {found['losses'][1]:.3f} at last",
            *(f"  {share:6.1%} in {n:5} calls  {name}" for name, share, n in found["kernels"]),
        )
    )


def main(argv):
    common.no_arguments(argv)
    common.use_compile_cache()
    found = measure(CONFIG(), STEPS.value, PROFILE.value)
    print(json.dumps(found) if JSON.value else describe(found))


if __name__ == "__main__":
    common.run(main)
