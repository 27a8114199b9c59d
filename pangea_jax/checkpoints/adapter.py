"""Writes adapters alone, as peft saves them, so that one model can serve many of them. `adapted.py` reads them."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array
from safetensors.numpy import save_file

from pangea_jax.checkpoints import huggingface, names, orbax
from pangea_jax.checkpoints.adapted import (
    CONFIG,
    WEIGHTS,
    WRAPPED,
    Adapters,
    is_adapter,
    read_adapter_config,
)
from pangea_jax.checkpoints.config import read_config
from pangea_jax.checkpoints.files import CheckpointError, require_new
from pangea_jax.checkpoints.folder import config_from_folder, load_policy, split_parts
from pangea_jax.data.reader import ReadingPolicy
from pangea_jax.model import PangeaConfig
from pangea_jax.model.lora import LoraConfig
from pangea_jax.model.params import flatten
from pangea_jax.work import atomic, paths
from pangea_jax.work.atomic import write_json

_LAYOUT = names.LAYOUTS["modules-5"]  # the modules of transformers 4.52 and later
# `config.pretrained` of a run that starts from the model in the package.
SAMPLE = ("tower", "model")
_MATRICES = {"a_ir": "lora_A", "b_ro": "lora_B"}


def save(
    params: Mapping[str, Array],
    config: LoraConfig,
    path: str | os.PathLike,
    *,
    base: str = "",
    policy: ReadingPolicy | None = None,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` adds to the model on which it was trained.

    On a pod every process must call it; process 0 writes.

    Args:
      params: parameters by name, including those of adapters.
      path: a folder, created if necessary.
      base: folder or hub name of that model, for `base_model_name_or_path`.
      policy: how the model reads conversations, for `pangea_jax.load`; peft does not read it.

    Raises:
      ValueError: there are no adapters.
    """
    folder, tensors = paths.path(path), {}
    for name, value in params.items():
        kernel, _, matrix = name.rpartition("_lora.")
        if kernel:
            for module, layer in zip(_modules(kernel, len(value)), _on_host(value)):
                # Our matrices are [inputs, outputs], torch's are [outputs, inputs].
                tensors[f"{module}{_MATRICES[matrix]}.weight"] = np.ascontiguousarray(layer.T)
    if not tensors:
        raise ValueError("there are no adapters to save; model.language.lora.rank is 0")
    if jax.process_index():
        return
    paths.make_folder(folder)
    with atomic.writing(folder / WEIGHTS) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    write_json(folder / CONFIG, _config(config, base))
    if policy is not None:
        policy.save(folder)


def _on_host(value: Array) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def load(folder: Path, config: PangeaConfig) -> dict[str, np.ndarray]:
    """The adapters of a peft folder as our parameters, to train them on.

    Raises:
      CheckpointError: they are not the adapters of `config.language.lora`; the message names the first difference.
    """
    lora = config.language.lora
    found = Adapters(folder, config, huggingface.kernel_shapes(config))
    params = {}
    for target in lora.targets:
        stem = f"language.blocks.{target}"
        kernel = next(row[0] for row in names.TABLE if row[0].startswith(f"{stem}_kernel_"))
        layers = [found.matrices(kernel, layer) for layer in range(config.language.layers)]
        wanted = lora.rank, lora.alpha / lora.rank
        for layer, matrices in enumerate(layers):
            has = matrices and (len(matrices[0]), matrices[2])
            if has != wanted:
                raise CheckpointError(
                    f"{folder}: {target} of layer {layer} has rank and scale {has}, "
                    f"config.model.language.lora makes them {wanted}"
                )
            del found.changes[kernel, layer]
        params[f"{stem}_lora.a_ir"] = np.stack([a.T for a, _, _ in layers])
        params[f"{stem}_lora.b_ro"] = np.stack([b.T for _, b, _ in layers])
    for path, layer in found.changes:
        raise CheckpointError(
            f"{folder} changes {path}, layer {layer}, which config.model.language.lora.targets does not train; "
            "add it, or merge the adapters with launch/convert.py --format=hf and start from the result"
        )
    return params


def convert(source: Path, target: Path, *, base: str = "") -> None:
    """Writes the adapters of a training run's newest step, completely or not at all.

    Args:
      base: see `save`; by default the model that the run names.

    Raises:
      CheckpointError: `source` is no run with adapters, or it is damaged.
      FileExistsError: `target` is there already.
    """
    require_new(target)
    location, config = orbax.find(source), config_from_folder(source)
    if location is None or not config.language.lora.rank:
        raise CheckpointError(
            f"{source} is no training run with adapters (config.model.language.lora)"
        )
    shapes = flatten(huggingface.abstract_state(config))
    adapters = {name: x.shape for name, x in shapes.items() if "_lora." in name}
    partial = target.with_name(f"{target.name}.partial")
    paths.remove_tree(partial)
    weights = orbax.OrbaxArrays(location, adapters)
    found = {
        name: weights.read(name, (slice(None),) * len(shape), weights.dtype(name))
        for name, shape in adapters.items()
    }
    base = base or base_of(read_config(source)[1])
    save(found, config.language.lora, partial, base=base, policy=load_policy(source))
    paths.move_tree(partial, target, last=CONFIG)


def base_of(config: Mapping[str, Any]) -> str:
    """The one model under the adapters of a run; "" if the run started from several parts.

    Args:
      config: the config of the run, as its config.json has it.
    """
    start, pretrained = config.get("init_from"), tuple(config.get("pretrained") or ())
    if not start:
        if pretrained == SAMPLE:
            return "sample"
        return pretrained[0] if len(pretrained) == 1 and not split_parts(pretrained[0])[1] else ""
    path = paths.expand(paths.path(start))
    if is_adapter(path):
        return read_adapter_config(path).get("base_model_name_or_path") or ""
    before = read_config(path)[1] if path.is_dir() else {}
    if not isinstance(before.get("model"), dict):
        return start
    old, new = (LoraConfig(**one["model"]["language"]["lora"]) for one in (before, config))
    if old.rank and old == new:  # they train on
        return base_of(before)
    return str(path / "model") if old.rank else start


def _modules(kernel: str, layers: int) -> list[str]:
    """Prefixes of peft's keys for one of our kernels, one per layer."""
    theirs = next(row[1] for row in names.TABLE if row[0].startswith(f"{kernel}_kernel_"))
    prefixes = dataclasses.asdict(_LAYOUT)
    stem = WRAPPED + theirs.removesuffix("weight")
    return [stem.format(**prefixes, layer=layer) for layer in range(layers)]


def _config(config: LoraConfig, base: str) -> dict:
    stems = (_modules(f"language.blocks.{target}", 1)[0] for target in config.targets)
    targets = "|".join(stem.rstrip(".").rpartition(".")[2] for stem in stems)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # The tower has modules with the same names.
        "target_modules": rf".*language_model\..*\.({targets})",
    }
