"""A model with the adapters of a peft folder (LoRA, Hu et al. 2021), read as if they were merged into its weights."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pangea_jax.checkpoints import names
from pangea_jax.checkpoints.files import (
    INDEX,
    SINGLE,
    CheckpointError,
    TensorFiles,
    cast,
    check_finite,
)
from pangea_jax.model import PangeaConfig
from pangea_jax.work import paths, untrusted

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WRAPPED = "base_model.model."  # peft wraps a model into two modules

# Keys of adapter_config.json that change no output of a trained adapter, or that `Adapters` reads.
_KNOWN = {
    *(
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "eva_config",
    ),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save"),
    *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
    *("target_modules", "task_type", "use_rslora"),
}
# Initial values that leave the base as it is. Others, such as "pissa", move a part of it into the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_MOST_BYTES = 16 << 20  # of adapter_config.json
# What LLaVA's own training writes beside its adapters.
_OTHER_WEIGHTS = "non_lora_trainables.bin"


class Weights(Protocol):
    """A model's parameters that can be read in parts."""

    shapes: dict[str, tuple[int, ...]]
    threads: int

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class AdapterFolder(os.PathLike):
    """A folder with adapters, and the folder of the model below them. As a path it is the first."""

    folder: Path
    base: Path

    def __fspath__(self) -> str:
        return str(self.folder)


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a folder holds adapters as peft saves them, and no whole model."""
    folder = paths.path(path)
    return (folder / CONFIG).is_file() and not any(
        (folder / name).is_file() for name in (SINGLE, INDEX)
    )


def read_adapter_config(folder: str | os.PathLike) -> dict[str, Any]:
    """adapter_config.json, if it describes LoRA that is computed here.

    Raises:
      CheckpointError: it is damaged, or a method is not supported; the message names the key.
    """
    file = paths.path(folder) / CONFIG
    try:
        values = untrusted.parse_json(untrusted.read_regular(file, _MOST_BYTES))
    except (untrusted.NotRegular, untrusted.TooLarge) as error:
        raise CheckpointError(str(error)) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(f"{file}: peft_type is {kind!r}, but only 'LORA' is supported")
    for key in sorted(set(values) - _KNOWN):
        if values[key]:
            raise CheckpointError(
                f"{file}: {key} is {values[key]!r}, which is not supported; merge the adapter with "
                "peft's merge_and_unload() and load the result"
            )
    start = values.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}: such an adapter also changes its base. Save it with "
            "peft's path_initial_model_for_weight_conversion, or merge it with merge_and_unload()"
        )
    for key in ("r", "lora_alpha"):
        if isinstance(values.get(key), bool) or not isinstance(values.get(key), int | float):
            raise CheckpointError(f"{file}: {key} is {values.get(key)!r}; expected a number")
    _check_scales(values, file)
    return values


def _check_scales(values: dict[str, Any], file: Path) -> None:
    """Ranks and scales must be positive, and their patterns regular expressions."""
    patterns = [values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    try:
        numbers = [values["r"], *(number for found in patterns for number in found.values())]
        for pattern in (pattern for found in patterns for pattern in found):
            re.compile(pattern)
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError("a rank or scale is not a positive number")
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None


@dataclasses.dataclass
class _Change:
    """What the adapters do to one tensor: replace it, or add scale * B A."""

    whole: str | None = None
    a: str | None = None
    b: str | None = None
    scale: float = 1.0


class Adapters:
    """The tensors of a peft folder, by the layer of our parameter that each of them changes.

    Args:
      shapes: of all parameters of the model, by name.

    Raises:
      CheckpointError: a tensor belongs to no parameter, or has another rank or shape; the message names it.
    """

    def __init__(self, folder: Path, config: PangeaConfig, shapes: Mapping[str, tuple[int, ...]]):
        self.config = read_adapter_config(folder)
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(
                f"no {WEIGHTS} in {folder}; pickled adapters (.bin) are not read, because unpickling "
                "runs code: load them with peft and save them again"
            )
        if (folder / _OTHER_WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder / _OTHER_WEIGHTS} holds pickled weights besides the adapters, which are not read; "
                "merge them with LLaVA's merge_lora_weights.py and load the result"
            )
        self._files = TensorFiles(folder / WEIGHTS)
        self._tied = config.language.tied_head
        found = [names.entries(shapes, config, layout) for layout in names.LAYOUTS.values()]
        self._places = {
            name: (entry, layer)
            for entries in found
            for entry in entries
            for layer, name in enumerate(entry.names)
        }
        self.changes: dict[tuple[str, int], _Change] = {}
        for key in sorted(self._files.names):
            self._add(key)
        for (path, layer), change in self.changes.items():
            if (change.a is None) != (change.b is None):
                raise self._refuse(
                    change.a or change.b, f"has no partner for {path}, layer {layer}"
                )

    def _refuse(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._files.path}: {key} {problem}")

    def _add(self, key: str) -> None:
        match = re.fullmatch(
            r"(.+)\.lora_(?:embedding_)?([AB])(\.weight)?", key.removeprefix(WRAPPED)
        )
        module = match[1] if match else None
        name = f"{module}.weight" if match else _without_wrappers(key.removeprefix(WRAPPED))
        if not key.startswith(WRAPPED) or name not in self._places:
            raise self._refuse(key, "changes no parameter of this model")
        entry, layer = self._places[name]
        if self._tied and entry.path in ("language.embedding_vd", "language.head_kernel_dv"):
            raise self._refuse(key, "changes one of two tied tensors; merge it with peft first")
        change, wanted = self.changes.setdefault((entry.path, layer), _Change()), entry.their_shape
        if match:
            wanted = self._matrix(change, key, match, wanted)
        else:
            change.whole = key
        if self._files.shapes[key] != wanted:
            raise self._refuse(
                key, f"is {self._files.shapes[key]}, but the model and {CONFIG} make it {wanted}"
            )

    def _matrix(self, change: _Change, key: str, match: re.Match, theirs) -> tuple[int, int]:
        """Notes A or B of a tensor with shape `theirs`, and returns the shape that it should have."""
        if len(theirs) != 2:
            raise self._refuse(key, f"adapts a tensor of shape {theirs}; merge it with peft first")
        module, letter, is_linear = match.groups()
        rank = self._of_pattern("rank_pattern", module, self.config["r"])
        change.scale = self._scale(module, rank)
        setattr(change, letter.lower(), key)
        # An embedding's matrices are transposed: they are added to its rows.
        outputs, inputs = theirs if is_linear else theirs[::-1]
        return (rank, inputs) if letter == "A" else (outputs, rank)

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._of_pattern("alpha_pattern", module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of_pattern(self, key: str, module: str, default: float) -> float:
        """The value of the first pattern that matches the end of a module's name, as in peft."""
        for pattern, value in (self.config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def matrices(self, path: str, layer: int) -> tuple[np.ndarray, np.ndarray, float] | None:
        """(A [rank, inputs], B [outputs, rank], scale) of one kernel; None without an adapter."""
        change = self.changes.get((path, layer))
        if change is None or change.a is None:
            return None
        a, b = (self._read(name) for name in (change.a, change.b))
        return a, b, change.scale

    def _read(self, name: str) -> np.ndarray:
        """A tensor as float32, if all of its values are finite."""
        x = np.asarray(self._files.tensor(name)[:])
        return check_finite(x, self._files.path, name).astype(np.float32)

    def apply(self, entry: names.Entry, layer: int, part: np.ndarray, index) -> np.ndarray:
        """A part of one layer of our parameter, float32, with its change.

        Args:
          part: `ours[index]` of the model below.
        """
        change = self.changes.get((entry.path, layer))
        if change is None:
            return part
        shape = entry.layer_shape
        if change.whole:
            part = names.read_part(self._read(change.whole), entry.axes, shape, index)
        found = self.matrices(entry.path, layer)
        if found is not None:
            a, b, scale = found
            product = scale * (b @ a)
            if change.a.endswith("lora_embedding_A"):
                product = product.T
            part = part + names.read_part(product, entry.axes, shape, index)
        return part


class AdaptedWeights:
    """The parameters of a model with its adapters merged: sums in float32, then rounded. See `Weights`."""

    def __init__(self, base: Weights, adapters: Adapters, config: PangeaConfig):
        self._base, self._adapters = base, adapters
        self.shapes, self.threads = base.shapes, base.threads
        kernels = {name: shape for name, shape in self.shapes.items() if "_lora." not in name}
        entries = names.entries(kernels, config, names.LAYOUTS["modules-5"])
        self._entries = {entry.path: entry for entry in entries}
        self._changed = {path for path, _ in adapters.changes}

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(name)

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """`array[index]` of one parameter in `dtype`."""
        if name not in self._changed:
            return self._base.read(name, index, dtype)
        entry = self._entries[name]
        part = np.array(self._base.read(name, index, np.dtype(np.float32)))
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, entry.shape))
        if not entry.stacked:
            return cast(self._adapters.apply(entry, 0, part, index), dtype, name)
        for i, layer in enumerate(range(index[0].start, index[0].stop)):
            part[i] = self._adapters.apply(entry, layer, part[i], index[1:])
        return cast(part, dtype, name)


def _without_wrappers(name: str) -> str:
    """The name of a whole tensor in the model, without the modules that peft puts around its own."""
    return re.sub(r"\.(base_layer|modules_to_save)(?=\.(weight|bias)$)", "", name)
