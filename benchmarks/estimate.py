"""The estimated time of a training step beside the measured one, over remat policies and meshes of small configs.

    python -m benchmarks.estimate [--rounds=5] [--configs=wide,long,deep]

Each config is compiled for 8 devices, simulated on this machine's processor, with each value of `keep` and each mesh.
`pangea_jax/train/roofline.py` estimates the time of a step from the compiled program and the rates of this machine,
which are measured first with all devices at work. Then the steps run in turn. Printed are the error, after one common
factor per config is taken out, and the share of pairs of settings that the estimate ranks as measured. Pairs whose
measured times differ by less than `--tie` are also counted apart, because the machine does not rank them either.
"""

import dataclasses
import gc
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import peer
from configs import sample
from pangea_jax import experiment, sharding, topologies
from pangea_jax.experiment import Experiment
from pangea_jax.sharding import MeshConfig
from pangea_jax.train import optimizer as optim
from pangea_jax.train import roofline
from pangea_jax.train.state import init_state
from pangea_jax.typed_config import build

DEVICES = 8
KEEP = ("none", "attention", "products")
MESHES = (MeshConfig(8, 1, 1), MeshConfig(1, 8, 1), MeshConfig(1, 4, 2))
CONFIGS = {  # the decoder, tokens of a row
    "wide": (dict(width=256, layers=3, heads=4, kv_heads=2, head_width=64, mlp=1024), 256),
    "long": (dict(width=128, layers=3, heads=4, kv_heads=2, head_width=32, mlp=256), 768),
    "deep": (dict(width=128, layers=10, heads=4, kv_heads=2, head_width=32, mlp=512), 256),
}


def make(name: str, keep: str, mesh: MeshConfig) -> Experiment:
    """A small model that trains as a whole on 8 rows, without pictures in its rows but one tile each."""
    language, row_tokens = CONFIGS[name]
    config = sample.get_config()
    config.model.vision.update(width=64, layers=2, heads=2, mlp=256, scan_unroll=1)
    config.model.language.update(**language, scan_unroll=1, vocab_size=1024, max_positions=1024)
    config.pipeline.update(rows=8, row_tokens=row_tokens, row_tiles=1, max_targets=row_tokens // 2)
    config.augmented_views, config.frozen, config.pretrained = 0, (), ()
    config.attention.name = "xla"
    found = build(Experiment, config)
    return dataclasses.replace(found, keep=keep, mesh=mesh)


def prepare(exp: Experiment):
    """The compiled step, and what it needs to run."""
    mesh = sharding.make_mesh(**dataclasses.asdict(exp.mesh), devices=jax.devices()[:DEVICES])
    optimizer = optim.make_optimizer(exp.optimizer, 1000)
    graphdef, state, shardings = init_state(exp.model, optimizer, mesh, seed=0, frozen=exp.frozen)
    step = experiment.make_step(exp, graphdef, optimizer, shardings, mesh)
    batch = jax.tree.map(lambda x: _batch(x, exp), experiment.batch_shapes(exp, mesh))
    return step.lower(state, batch).compile(), state, batch


def _batch(shape, exp: Experiment):
    """Ones where a token, place or weight is wanted: one segment, words only."""
    value = np.ones(shape.shape, shape.dtype)
    return jax.device_put(value, shape.sharding)


def rates() -> roofline.Chip:
    """The rates of one of the devices while all of them work."""
    mesh = jax.make_mesh((DEVICES,), ("all",), devices=jax.devices()[:DEVICES])
    split = NamedSharding(mesh, P("all"))

    def seconds(function, shape, spec=split.spec) -> float:
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=P("all"), out_specs=spec, check_vma=False
        )
        jitted, x = jax.jit(mapped), jax.device_put(jnp.ones((DEVICES, *shape)), split)
        jax.block_until_ready(jitted(x))
        found = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready(jitted(x))
            found.append(time.perf_counter() - start)
        return min(found)

    n, large, turns = 384, 2**20, 200
    product = seconds(lambda x: x[0] @ x[0] @ x[0] @ x[0], (n, n), P("all"))
    plus = seconds(lambda x: x + 1, (4 * large,))
    tiny = seconds(lambda x: jax.lax.psum(x, "all"), (8,), P())
    sums = seconds(lambda x: jax.lax.psum(x, "all"), (large,), P())
    loop = seconds(lambda x: jax.lax.fori_loop(0, turns, lambda _, y: jnp.sin(y), x), (8,))
    received = 2 * (DEVICES - 1) / DEVICES * 4 * large
    return roofline.Chip(
        flops=3 * 2 * n**3 / product,
        memory=2 * 4 * 4 * large / plus,
        links=received / max(sums - tiny, 1e-6),
        overhead_s=loop / turns,
        latency_s=tiny,
    )


def measure(names, rounds: int) -> dict[str, np.ndarray]:
    """Estimated and measured seconds [settings, 2] of each config."""
    chip, found = rates(), {}
    print(
        f"one of {DEVICES} devices: {chip.flops / 1e9:.1f} GFLOP/s, {chip.memory / 1e9:.2f} GB/s of memory, "
        f"{chip.links / 1e9:.2f} GB/s between devices; {1e6 * chip.overhead_s:.0f} us an instruction, "
        f"{1e6 * chip.latency_s:.0f} us a collective"
    )
    for name in names:
        estimates, steps = {}, {}
        for keep, mesh in itertools.product(KEEP, MESHES):
            compiled, state, batch = prepare(make(name, keep, mesh))
            key = f"{name:5} keep {keep:10} mesh {mesh.data}x{mesh.fsdp}x{mesh.tensor}"
            estimates[key] = roofline.step_time(compiled.as_text(), chip, DEVICES)["step_s"]
            steps[key] = _runner(compiled, state, batch)
        times = peer.alternate(steps, rounds)
        taken = {key: float(np.median(seconds[:, 0])) for key, seconds in times.items()}
        for key, estimate in estimates.items():
            print(f"{key}  estimate {1e3 * estimate:7.1f} ms   measured {1e3 * taken[key]:7.1f} ms")
        found[name] = np.array([[estimates[key], taken[key]] for key in estimates])
        steps.clear()
        gc.collect()
    return found


def _runner(compiled, state, batch):
    held = [state]

    def run():
        held[0], metrics = compiled(held[0], batch)
        return metrics["loss"], held[0].step

    return run


def ranked(times: np.ndarray, tie: float) -> tuple[int, int]:
    """(pairs ranked as measured, pairs), without pairs whose measured times differ by less than the share `tie`."""
    right = pairs = 0
    for (e1, m1), (e2, m2) in itertools.combinations(times, 2):
        if abs(m1 - m2) > tie * min(m1, m2):
            pairs += 1
            right += (e1 < e2) == (m1 < m2)
    return right, pairs


def main():
    parser = peer.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--tie", type=float, default=0.05)
    args = parser.parse_args()
    topologies.make_mesh(f"cpu:{DEVICES}", 1, MeshConfig())
    print(peer.machine())
    found = measure(args.configs.split(","), args.rounds)
    totals = np.zeros((2, 2), int)
    for name, times in found.items():
        factor = np.exp(np.log(times[:, 1] / times[:, 0]).mean())
        error = np.abs(factor * times[:, 0] / times[:, 1] - 1).mean()
        counts = np.array([ranked(times, 0.0), ranked(times, args.tie)])
        totals += counts
        print(f"{name}: measured is {factor:.2f} of the estimate, error beside that {error:.0%}")
    for (right, pairs), what in zip(totals, ("all", f"those that differ by {args.tie:.0%}")):
        if pairs:
            print(f"{what}: {right} of {pairs} pairs ranked as measured ({right / pairs:.0%})")


if __name__ == "__main__":
    main()
