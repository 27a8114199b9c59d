"""A compiled training step in a file. launch/compile.py writes it; launch/train.py runs it instead of compiling.

The file is a ZIP of `facts.json`, which describes the devices, versions, config and program, and of `program`, the
executable as XLA serialises it. Loading unpickles nothing, and refuses a program that differs from the step of the run.
But the file still holds a program: load only files that you compiled yourself, as with JAX's compile cache.
"""

import base64
import hashlib
import importlib.metadata
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental.mosaic.dialects import tpu
from jax.extend.mlir import ir

from launch import common
from pangea_jax.experiment import Experiment
from pangea_jax.work import atomic, paths, restart


def save(
    path: Path,
    lowered: jax.stages.Lowered,
    compiled: jax.stages.Compiled,
    mesh: jax.sharding.Mesh,
    config: Experiment,
    steps: int,
) -> None:
    """Writes the whole file or nothing.

    Args:
      compiled: not from the compile cache, because XLA cannot serialise a program that it has read.
      steps: number of steps of the run. The schedule of the learning rate is part of the program.
    """
    with (
        atomic.writing(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file,
    ):
        file.writestr("facts.json", json.dumps(_facts(lowered, mesh, config, steps), indent=2))
        file.writestr("program", compiled.runtime_executable().serialize())


def load(
    path: Path,
    step: Callable,
    arguments: tuple,
    mesh: jax.sharding.Mesh,
    config: Experiment,
    steps: int,
) -> Callable:
    """Loads the program in the file, as a function that replaces `step`.

    It traces `step` to compare the programs, but does not compile it.

    Args:
      step: made by `make_train_step`.
      arguments: shapes of state and batch, with shardings.

    Raises:
      UserError: the file has another format, or holds another program or one for other devices or versions; the
        message says what differs.
    """
    try:
        with paths.nearby(paths.path(path)) as near, zipfile.ZipFile(near) as file:
            facts = json.loads(file.read("facts.json"))
            program = file.read("program")
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise common.UserError(
            f"launch/compile.py --output did not write {path}: {error}"
        ) from None
    lowered = step.lower(*arguments)
    differing = _differing(facts, _facts(lowered, mesh, config, steps))
    if differing:
        raise common.UserError(
            f"{path} holds another program ({'; '.join(differing[:4])}); compile it again with "
            "launch/compile.py --output, or leave out --executable to compile here"
        )
    devices = list(mesh.devices.flat)
    executable = devices[0].client.deserialize_executable(program, devices)
    return _call(executable, arguments, lowered.out_info)


def _call(executable, arguments, results) -> Callable:
    """A function that runs the executable on arguments of this structure; it donates the same arguments as `step`."""
    expected, in_tree = jax.tree.flatten(arguments)
    returned, out_tree = jax.tree.flatten(results)

    def call(*given):
        values, tree = jax.tree.flatten(given)
        if tree != in_tree:
            raise ValueError(f"the compiled step takes {in_tree}, not {tree}")
        for value, want in zip(values, expected, strict=True):
            # The runtime accepts any buffers, and would misread wrong ones.
            if (value.shape, value.dtype) != (want.shape, want.dtype) or not (
                value.sharding.is_equivalent_to(want.sharding, value.ndim)
            ):
                raise ValueError(
                    f"the compiled step takes {want}, not {value.aval} on {value.sharding}"
                )
        shards = executable.execute_sharded(values).disassemble_into_single_device_arrays()
        arrays = [
            jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
            for leaf, parts in zip(returned, shards, strict=True)
        ]
        return jax.tree.unflatten(out_tree, arrays)

    return call


def _facts(lowered, mesh, config, steps) -> dict[str, Any]:
    devices = mesh.devices.flat
    packages = ("jax", "jaxlib", *(["libtpu"] if devices[0].platform == "tpu" else []))
    places = [_place(device) for device in devices]
    return {
        "devices": {
            "kind": devices[0].device_kind,
            "grid": [1 + max(axis) - min(axis) for axis in zip(*places)],
            "mesh": dict(mesh.shape),
            "order": _digest(json.dumps(places)),
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "config": common.to_json(config) | {"steps": steps},
        "program": _digest(without_locations(lowered.as_text())),
    }


def _place(device) -> list[int]:
    """Slice, coordinates and core of a TPU device; the id of another device."""
    if device.platform != "tpu":
        return [device.id]
    return [getattr(device, "slice_index", 0), *device.coords, device.core_on_chip]


# A Pallas kernel in the text of a program: MLIR bytecode in base64, in the JSON of a custom call.
_KERNEL = re.compile(r"(\\22body\\22: \\22)([A-Za-z0-9+/=]+)(?=\\22)")
# JAX 0.12 keeps the source locations in a field of their own.
_LOCATIONS = re.compile(r"(\\22debug_locations\\22: \\22)[A-Za-z0-9+/=]*(?=\\22)")


def without_locations(program: str) -> str:
    """The text of a lowered program, with its kernels as MLIR text without source locations.

    The bytecode of a kernel holds the paths and lines where it was traced. They differ between machines, and between
    launch/compile.py and train.py.
    """

    def assembly(match):
        with ir.Context() as context:
            tpu.register_dialect(context)
            context.allow_unregistered_dialects = True
            kernel = ir.Module.parse(base64.b64decode(match[2]))
            return match[1] + kernel.operation.get_asm(enable_debug_info=False)

    return _KERNEL.sub(assembly, _LOCATIONS.sub(r"\1", program))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _differing(theirs, mine) -> list[str]:
    """Why two programs differ, first cause first. Keys of the config count only if the programs differ."""
    for part in ("devices", "versions"):
        found = atomic.differences(theirs.get(part), mine[part], part)
        if found:
            return restart.clauses(found)
    if theirs.get("program") == mine["program"]:
        return []
    config = atomic.differences(theirs.get("config"), mine["config"], "config")
    return restart.clauses(config) or ["the same config, compiled from other code"]
