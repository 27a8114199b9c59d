"""Loads a model by folder or hub name, in any form."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
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
    """The folder of a model; a model of the Hugging Face hub is fetched first.

    Args:
      name_or_path: a folder (or .safetensors file), or `owner/name` on the hub.

    Raises:
      FileNotFoundError: neither a folder nor of the form of a hub name.
      CheckpointError: the hub cannot be reached, does not have it, or asks for a login.
    """
    # A shell leaves the ~ of --model=~/DIR as it is.
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(f"there is no folder {name}, and that is no hub name (owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception as error:  # of whatever HTTP library its version uses; none is hidden
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise CheckpointError(
            f"there is no folder {name}, and it could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); without a network, fetch it elsewhere "
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

    Each parameter goes straight to its devices. The host holds one at a time, and of a sharded one the part of one
    device.

    Args:
      path: a folder, or a .safetensors file.
      config: sizes; by default from the folder's config.json.
      only: some of "vision", "projector", "newline", "language", to start from a tower or a decoder alone; the
        checkpoint may hold other parts.
      dtype: of the parameters; by default as in the checkpoint.
      shardings: a state shaped like the result with a `jax.sharding.Sharding` for every parameter.

    Returns:
      The parameters (of `only`), for `nnx.update(model, state)` or `nnx.merge`.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: names the missing, unexpected or misshapen tensors, or the broken file.
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
    """The parameters of a model, of which any part can be read; arguments and errors as for `load`."""
    location, config = orbax.find(path), config or config_from_folder(path)
    if location is None:
        return huggingface.PublicWeights(path, config, only)
    return orbax.OrbaxArrays(location, huggingface.shapes_of(config, only))


def _place(weights, name, dtype, sharding) -> jax.Array:
    """One parameter on its devices, each part read by itself."""
    dtype, shape = np.dtype(dtype or weights.dtype(name)), weights.shapes[name]
    if sharding is None:
        # Nothing else holds the array, so a CPU may use it without a copy.
        whole = weights.read(name, (slice(None),) * len(shape), dtype)
        return jax.device_put(whole, may_alias=True)
    return jax.make_array_from_callback(
        shape, sharding, lambda index: weights.read(name, index, dtype)
    )


def load_model(path: str | os.PathLike, config: PangeaConfig | None = None, **kwargs) -> Pangea:
    """The whole model from a folder; arguments as of `load`."""
    if kwargs.get("only") is not None:
        raise ValueError("load_model() makes whole models; use load(only=...) and nnx.update")
    config = config or config_from_folder(path)
    return nnx.merge(huggingface.abstract_model(config)[0], load(path, config, **kwargs))


def tokenizer_files(path: str | os.PathLike) -> Path:
    """The folder or file of a model's tokenizer: its own folder, or what the config of its training run names."""
    data = read_config(path)[1].get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    if named is None:
        return Path(path)
    return assets.EMOJI if named == "emoji" else Path(named)


def load_policy(path: str | os.PathLike) -> ReadingPolicy:
    """How the model in a folder reads conversations: as it was trained to, where that was saved.

    It lies in `reading.json` beside the weights, or in the config of a training run. A model without either was
    imported, and reads as the reference does.

    Raises:
      ValueError: what was saved is damaged; names the file.
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
        return ReadingPolicy()
    return ReadingPolicy.from_json(reading, f"{config_file}, field 'reading'")


def load_tokenizer(
    path: str | os.PathLike, files: str | os.PathLike | None = None
) -> tokenizers.Tokenizer:
    """The tokenizer of the model in a folder.

    Args:
      path: the model's folder. If the tokenizer's files do not give the id of `<image>`, its config.json does;
        if neither does, as in LLaVA's own layout, it is Pangea's.
      files: the folder or file of the tokenizer; by default `tokenizer_files(path)`.

    Raises:
      FileNotFoundError: no tokenizer there.
      ValueError: a tokenizer that cannot be used, or that disagrees with config.json.
    """
    files = Path(files or tokenizer_files(path))
    try:
        return tokenizers.load_tokenizer(files, image_token(path))
    except tokenizers.NoImageToken:
        return tokenizers.load_tokenizer(files, PANGEA_TOKENS.image)
