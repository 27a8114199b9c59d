"""The mesh, and one table: how every parameter is sharded over it."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# A batch is split over both data axes; parameters over fsdp and tensor.
BATCH_SPEC = P(("data", "fsdp"))

# First match wins. The leading axis of `blocks` is the layer, never split: the scan walks along it.
_BLOCKS = r"(vision|language)\.(tail_)?blocks\."
RULES: tuple[tuple[str, P], ...] = (
    (_BLOCKS + r"[qkv]_kernel_d[hk]c", P(None, "fsdp", "tensor", None)),
    (_BLOCKS + r"[qkv]_bias_[hk]c", P(None, "tensor", None)),
    (_BLOCKS + r"o_kernel_hcd", P(None, "tensor", None, "fsdp")),
    (_BLOCKS + r"(gate|up)_kernel_df", P(None, "fsdp", "tensor")),
    (_BLOCKS + r"up_bias_f", P(None, "tensor")),
    (_BLOCKS + r"down_kernel_fd", P(None, "tensor", "fsdp")),
    (_BLOCKS + r"([qkv]|gate|up)_lora\.a_ir", P(None, "fsdp", None)),
    (_BLOCKS + r"([qkv]|gate|up)_lora\.b_ro", P(None, None, "tensor")),
    (_BLOCKS + r"(o|down)_lora\.a_ir", P(None, "tensor", None)),
    (_BLOCKS + r"(o|down)_lora\.b_ro", P(None, None, "fsdp")),
    (r"language\.embedding_vd", P("tensor", "fsdp")),
    (r"language\.head_kernel_dv", P("fsdp", "tensor")),
    (r"projector\.in_kernel_ed", P("fsdp", "tensor")),
    (r"projector\.out_kernel_dd", P("tensor", "fsdp")),
    (r"vision\.patch_kernel_hwcd", P(None, None, None, "fsdp")),
    (r"vision\.position_embedding_sd", P(None, "fsdp")),
    (r".*(norm\.(scale|bias)|_bias_d|class_embedding_d|newline_d)", P()),
)
MAX_REPLICATED = 0.02


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, see `make_mesh`; -1 takes the remaining devices."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of the axes `AXES`. One size may be -1: it takes the remaining devices.

    Each of several TPU slices holds whole fsdp x tensor groups. Only `data`, which sends every gradient once per step,
    uses the data centre network between slices. `tensor` stays within a process.

    Raises:
      ValueError: the product of the sizes is not the number of devices, `data` is no multiple of the number of slices,
        or `tensor` does not divide the devices of a process.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh {dict(zip(AXES, sizes))}: only one axis may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))} does not fill the {len(devices)} devices there are; "
            "set one axis to -1 or change --config.mesh"
        )
    slices = num_slices(devices)
    data, *within = sizes
    if data % slices:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))}: the devices are {slices} TPU slices, which only axis "
            f"'data' may span; set --config.mesh.data={slices} or a multiple, with fsdp x tensor within the "
            f"{len(devices) // slices} chips of a slice"
        )
    parts = collections.defaultdict(list)
    for device in devices:
        parts[device.slice_index if slices > 1 else 0].append(device)
    grids = [_grid((data // slices, *within), parts[index]) for index in sorted(parts)]
    # Auto axes: we give the shardings of inputs and outputs, and XLA finds those between.
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(sizes, devices):
    """The devices of one slice in the order of its network. All devices of a row are in the process that reads it."""
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    process_of = np.vectorize(lambda device: device.process_index, otypes=[int])(grid)
    if (process_of == process_of[..., :1]).all():
        return grid
    processes = len(np.unique(process_of))
    own = len(devices) // processes
    if own % sizes[2]:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))}: axis 'tensor' splits a row, which one process reads, over more "
            f"than the {own} devices of a process; set --config.mesh.tensor to a divisor of {own}"
        )
    data = math.gcd(sizes[0], processes)
    outer = (data, processes // data, 1)
    inner = tuple(size // count for size, count in zip(sizes, outer))
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=True, allow_split_physical_axes=True
    )


def num_slices(devices) -> int:
    """Number of TPU slices, which only the data centre network connects; 1 for other devices."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def row_shards(mesh: Mesh | None) -> int:
    """Number of parts that the rows of a batch are split into; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])


def spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of one parameter.

    Raises:
      ValueError: no rule matches the name, or a mesh axis does not divide a dimension.
    """
    # Codes and scales of a kernel in 8 or 4 bits lie as the kernel does. A scale has few or no places for the inputs.
    kernel, part = quantized_part(name)
    rule = next((spec for pattern, spec in RULES if re.fullmatch(pattern, kernel)), None)
    if rule is None:
        raise ValueError(
            f"no sharding rule matches parameter {name!r}; add one to pangea_jax/sharding.py"
        )
    if part == "scale":
        fits = (axis and shape[dim] % mesh.shape[axis] == 0 for dim, axis in enumerate(rule))
        return P(*(axis if fit else None for axis, fit in zip(rule, fits)))
    for dim, axis in enumerate(rule):
        if axis and shape[dim] % mesh.shape[axis]:
            raise ValueError(
                f"parameter {name} {shape}: dimension {dim} does not divide over the {mesh.shape[axis]} "
                f"devices of mesh axis {axis!r}; choose another --config.mesh"
            )
    return rule


def quantized_part(name: str) -> tuple[str, str]:
    """The kernel and the part ("codes" or "scale") of an array of `model.quantized`; the name and "" of others."""
    found = re.fullmatch(r"(.*(?:_kernel_\w+|embedding_vd))\.(codes|scale)", name)
    return found.groups() if found else (name, "")


def param_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, NamedSharding]:
    """The sharding of every parameter.

    Raises:
      ValueError: more than 2 % of the bytes would be replicated on a sharded mesh.
    """
    shardings = {
        name: NamedSharding(mesh, spec(name, leaf.shape, mesh)) for name, leaf in shapes.items()
    }
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        total = sum(_bytes(leaf) for leaf in shapes.values())
        whole = sum(
            _bytes(shapes[name])
            for name, found in shardings.items()
            if found.is_fully_replicated and quantized_part(name)[1] != "scale"
        )
        if whole > MAX_REPLICATED * total:
            raise ValueError(
                f"{whole / total:.1%} of the parameter bytes are replicated on a mesh of "
                f"{dict(mesh.shape)}, more than {MAX_REPLICATED:.0%}; add rules to pangea_jax/sharding.py"
            )
    return shardings


def state_shardings(state_shapes, shardings: Mapping[str, NamedSharding], mesh: Mesh):
    """Shardings of a pytree that contains parameter dicts, such as a train state.

    A leaf under a parameter's name is sharded like the parameter if it has the same rank; all others are replicated.
    """
    replicated = NamedSharding(mesh, P())

    def place(path, leaf):
        for entry in reversed(path):
            sharding = shardings.get(getattr(entry, "key", None))
            if sharding is not None and len(sharding.spec) <= len(leaf.shape):
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(place, state_shapes)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """`x` with the sharding `spec` on the mesh in context; `x` itself if there is no mesh."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def table(
    shapes: Mapping[str, jax.ShapeDtypeStruct], shardings: Mapping[str, NamedSharding]
) -> str:
    """The table that `launch/train.py` logs at the start: parameter, shape, spec, bytes per device."""
    lines = []
    total = per_device = 0
    for name, leaf in shapes.items():
        local = math.prod(shardings[name].shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total, per_device = total + _bytes(leaf), per_device + local
        axes = ", ".join(str(axis) for axis in shardings[name].spec) or "replicated"
        lines.append(f"{name:44} {leaf.dtype!s:9} {leaf.shape!s:24} {axes:32} {_human(local):>10}")
    lines.append(f"{'all parameters':44} {_human(total)} in all, {_human(per_device)} per device")
    return "\n".join(lines)


def _bytes(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
