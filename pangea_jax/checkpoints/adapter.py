"""Writes adapters alone, as peft saves them, so that one model can serve many of them."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from pangea_jax.checkpoints import huggingface, names, orbax
from pangea_jax.checkpoints.config import config_from_folder
from pangea_jax.checkpoints.files import CheckpointError, require_new
from pangea_jax.model.lora import LoraConfig
from pangea_jax.model.params import flatten
from pangea_jax.work.atomic import write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The modules of transformers 4.52 and later; peft wraps them into two more.
_WRAPPED, _LAYOUT = "base_model.model.", names.LAYOUTS["modules-5"]
_MATRICES = {"a_ir": "lora_A", "b_ro": "lora_B"}


def save(
    params: Mapping[str, Array], config: LoraConfig, path: str | os.PathLike, *, base: str = ""
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` adds to the model on which it was trained.

    Args:
      params: parameters by name, including those of adapters.
      path: a folder, created if necessary.
      base: folder or hub name of that model, for `base_model_name_or_path`.

    Raises:
      ValueError: there are no adapters.
    """
    folder, tensors = Path(path), {}
    for name, value in params.items():
        kernel, _, matrix = name.rpartition("_lora.")
        if kernel:
            for module, layer in zip(_modules(kernel, len(value)), jax.device_get(value)):
                # Our matrices are [inputs, outputs], torch's are [outputs, inputs].
                tensors[f"{module}{_MATRICES[matrix]}.weight"] = np.ascontiguousarray(layer.T)
    if not tensors:
        raise ValueError("there are no adapters to save; model.language.lora.rank is 0")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, _config(config, base))


def convert(source: Path, target: Path, *, base: str = "") -> None:
    """Writes the adapters of a training run's newest step, completely or not at all; `base`: see `save`.

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
    shutil.rmtree(partial, ignore_errors=True)
    weights = orbax.OrbaxArrays(location, adapters)
    found = {
        name: weights.read(name, (slice(None),) * len(shape), weights.dtype(name))
        for name, shape in adapters.items()
    }
    save(found, config.language.lora, partial, base=base)
    os.replace(partial, target)


def _modules(kernel: str, layers: int) -> list[str]:
    """Prefixes of peft's keys for one of our kernels, one per layer."""
    theirs = next(row[1] for row in names.TABLE if row[0].startswith(f"{kernel}_kernel_"))
    prefixes = dataclasses.asdict(_LAYOUT)
    stem = _WRAPPED + theirs.removesuffix("weight")
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
