"""Accelerators that are not here: a mesh of their devices, for which programs can be compiled.

The compiler of TPUs is in libtpu (requirements-tpu-aot.txt). It works on any machine.
"""

import dataclasses
import os

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from pangea_jax import sharding

GIB = 2**30
# The memory that the compiler lets a program use, out of the 16, 95 and 32 GB of a chip.
HBM_GIB = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
# libtpu reads these when it is loaded. With them it asks no metadata server and locks no device.
_NO_TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def make_mesh(name: str, slices: int, sizes) -> tuple[Mesh, float]:
    """The mesh on the chips of a topology, and the memory of a chip in GiB.

    Args:
      name: GENERATION:SHAPE as `jax.experimental.topologies` has it, such as v5e:4x4; cpu:8 stands for 8 devices on the
        processor of this machine.
      slices: number of slices, joined by the data centre network.
      sizes: dataclass with the arguments of `sharding.make_mesh`.

    Raises:
      ValueError: libtpu is not installed or does not know the topology, or this process has other CPU devices already.
    """
    generation, _, shape = name.partition(":")
    if generation == "cpu" and shape.isdecimal() and slices == 1:
        return _cpu_mesh(name, int(shape), sizes)
    if generation not in HBM_GIB:
        raise ValueError(
            f"--topology={name}: expected one of {', '.join(HBM_GIB)} with a shape, as in v5e:4x4; or cpu:8"
        )
    for variable, value in _NO_TPU_HOST.items():
        os.environ.setdefault(variable, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError(
            "the TPU compiler is in libtpu, which is not installed: pip install -r requirements-tpu-aot.txt"
        ) from None
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=slices
        )
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(f"--topology={name}: libtpu says {error}") from None
    mesh = sharding.make_mesh(**dataclasses.asdict(sizes), devices=topology.devices)
    return mesh, HBM_GIB[generation]


def _cpu_mesh(name: str, count: int, sizes) -> tuple[Mesh, float]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has counted them
        if jax.device_count("cpu") < count:
            raise ValueError(
                f"--topology={name}: this process has {jax.device_count('cpu')} devices already"
            ) from None
    devices = jax.devices("cpu")[:count]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    mesh = sharding.make_mesh(**dataclasses.asdict(sizes), devices=devices)
    return mesh, round(memory / count, 2)
