"""Finds the folder of a model, and loads parameters, tokenizer and reading policy from it."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from pangea_jax import assets
from pangea_jax.checkpoints import huggingface, orbax
from pangea_jax.checkpoints.config import (
    PANGEA_TOKENS,
    config_from_folder,
    image_token,
    read_config,
)
from pangea_jax.checkpoints.files import CheckpointError
from pangea_jax.data import tokenizer as tokenizers
from pangea_jax.data.reader import POLICY_FILE, ReadingPolicy
from pangea_jax.model import Pangea, PangeaConfig
from pangea_jax.model.params import flatten, unflatten

# Pickled weights are not fetched: unpickling runs code.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]


def resolve(name_or_path: str | os.PathLike) -> Path:
    """The folder of a model; downloads a model of the Hugging Face hub.

    Args:
      name_or_path: a folder (or .safetensors file), or `owner/name` on the hub.

    Raises:
      FileNotFoundError: there is no such folder, and the name is not a hub name.
      CheckpointError: the hub cannot be reached, does not have the model, or asks for a login.
    """
    # A shell does not expand the ~ in --model=~/DIR.
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(f"there is no folder {name}, and it is not a hub name (owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception as error:  # the type depends on the version's HTTP library
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise CheckpointError(
            f"there is no folder {name}, and it could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); without a network, download it elsewhere "
            f"(`hf download {name} --local-dir=DIR`) and pass the folder"
        ) from None


def load(
    path: str | os.PathLike,
    config: PangeaConfig | None = None,
    *,
    only: Sequence[str] | None = None,
    dtype: jnp.dtype | None = None,
    shardings: nnx.State | None = None,
) -> nnx.State:
    """Reads parameters from a public layout, from our own form, or from the newest step of a run.

    Each parameter goes straight to its devices. The host holds one parameter at a time; if it is
    sharded, only the part of one device.

    Args:
      path: a folder, or a .safetensors file.
      config: the sizes; by default from the folder's config.json.
      only: some of "vision", "projector", "newline", "language", for example to load a tower alone.
        The checkpoint may have other parts.
      dtype: of the parameters; by default as in the checkpoint.
      shardings: a state shaped like the result with a `jax.sharding.Sharding` for every parameter.

    Returns:
      The parameters (of `only`), for `nnx.update(model, state)` or `nnx.merge`.

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointError: tensors are missing, unexpected or have a wrong shape, or a file is damaged;
        the message names them.
    """
    weights = open_weights(path, config, only)
    targets = flatten(shardings) if shardings is not None else {}
    missing = [name for name in weights.shapes if targets and name not in targets]
    if missing:
        raise ValueError(f"shardings lack {', '.join(missing)}")
    return unflatten(
        {name: _place(weights, name, dtype, targets.get(name)) for name in weights.shapes}
    )


def open_weights(
    path: str | os.PathLike, config: PangeaConfig | None, only: Sequence[str] | None = None
) -> huggingface.PublicWeights | orbax.OrbaxArrays:
    """Opens a model's parameters to read any part of them; arguments and errors as for `load`."""
    location, config = orbax.find(path), config or config_from_folder(path)
    if location is None:
        return huggingface.PublicWeights(path, config, only)
    return orbax.OrbaxArrays(location, huggingface.shapes_of(config, only))


def _place(weights, name, dtype, sharding) -> jax.Array:
    """One parameter on its devices. The part of each device is read alone."""
    dtype, shape = np.dtype(dtype or weights.dtype(name)), weights.shapes[name]
    if sharding is None:
        # Nothing else holds the array, so a CPU may use it without a copy.
        whole = weights.read(name, (slice(None),) * len(shape), dtype)
        return jax.device_put(whole, may_alias=True)
    return jax.make_array_from_callback(
        shape, sharding, lambda index: weights.read(name, index, dtype)
    )


def load_model(path: str | os.PathLike, config: PangeaConfig | None = None, **kwargs) -> Pangea:
    """The whole model from a folder; arguments as for `load`, without `only`."""
    if kwargs.get("only") is not None:
        raise ValueError("load_model() makes whole models; use load(only=...) and nnx.update")
    config = config or config_from_folder(path)
    return nnx.merge(huggingface.abstract_model(config)[0], load(path, config, **kwargs))


def tokenizer_files(path: str | os.PathLike) -> Path:
    """The folder or file of a model's tokenizer.

    The config of a training run names it; for other models it is the model's own folder.
    """
    data = read_config(path)[1].get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    if named is None:
        return Path(path)
    return assets.EMOJI if named == "emoji" else Path(named)


def load_policy(path: str | os.PathLike) -> ReadingPolicy:
    """How the model in a folder reads conversations.

    The policy is in `reading.json` beside the weights, or in the config of a training run. A model
    without either was imported and reads like the reference.

    Raises:
      ValueError: the saved policy is damaged; the message names the file.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / POLICY_FILE
    if file.is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
        return ReadingPolicy.from_json(content, str(file))
    config_file, config = read_config(path)
    reading = config.get("reading")
    if reading is None:
        if "model" in config:  # of a training run
            logging.warning(
                "%s has no field 'reading': the run is older than saved reading policies. It is read like the "
                "reference; replace what differed, as in pangea_jax.load(..., background=(255, 255, 255))",
                config_file,
            )
        return ReadingPolicy()
    return ReadingPolicy.from_json(reading, f"{config_file}, field 'reading'")


def load_tokenizer(
    path: str | os.PathLike, files: str | os.PathLike | None = None
) -> tokenizers.Tokenizer:
    """The tokenizer of the model in a folder.

    Args:
      path: the model's folder. The id of `<image>` comes from the tokenizer's files, else from
        config.json. If neither has it, as in LLaVA's own layout, it is Pangea's id.
      files: the folder or file of the tokenizer; by default `tokenizer_files(path)`.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: the tokenizer cannot be used, or disagrees with config.json.
    """
    files = Path(files or tokenizer_files(path))
    try:
        return tokenizers.load_tokenizer(files, image_token(path))
    except tokenizers.NoImageToken:
        return tokenizers.load_tokenizer(files, PANGEA_TOKENS.image)
