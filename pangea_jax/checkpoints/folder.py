"""A model by folder or hub name, in whatever form it lies there."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from pangea_jax.checkpoints import huggingface, orbax
from pangea_jax.checkpoints.config import (
    PANGEA_TOKENS,
    config_from_folder,
    image_token,
    read_config,
)
from pangea_jax.checkpoints.files import CheckpointError
from pangea_jax.data import tokenizer as tokenizers
from pangea_jax.model import Pangea, PangeaConfig
from pangea_jax.model.params import flatten, unflatten
from pangea_jax.sample import emoji

# Weights as safetensors only: whatever needs unpickling is not even fetched.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]


def resolve(name_or_path: str | os.PathLike) -> Path:
    """The folder of a model: itself, or where a model of the Hugging Face hub was fetched to.

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
        raise FileNotFoundError(f"there is no folder {name}, and it is no hub name (owner/name)")
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

    Arguments, result and errors as of `pangea_jax.checkpoints.huggingface.load`; every parameter
    goes straight to its devices.
    """
    location = orbax.find(path)
    if location is None:
        return huggingface.load(path, config, only=only, dtype=dtype, shardings=shardings)
    shapes = huggingface.shapes_of(config or config_from_folder(path), only)
    targets = None if shardings is None else flatten(shardings)
    return unflatten(orbax.load(location, shapes, dtype=dtype, shardings=targets))


def load_model(path: str | os.PathLike, config: PangeaConfig | None = None, **kwargs) -> Pangea:
    """The whole model from a folder; arguments as of `load`."""
    if kwargs.get("only") is not None:
        raise ValueError("load_model() makes whole models; use load(only=...) and nnx.update")
    config = config or config_from_folder(path)
    return nnx.merge(huggingface.abstract_model(config)[0], load(path, config, **kwargs))


def tokenizer_files(path: str | os.PathLike) -> Path:
    """The folder or file of a model's tokenizer: its own folder, or what a training run was told."""
    data = read_config(path)[1].get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    if named is None:
        return Path(path)
    return emoji.DIRECTORY if named == "emoji" else Path(named)


def load_tokenizer(
    path: str | os.PathLike, files: str | os.PathLike | None = None
) -> tokenizers.Tokenizer:
    """The tokenizer of the model in a folder.

    Args:
      path: the model's folder; its config.json says which id `<image>` has where the tokenizer's
        files do not. Where neither does, as in LLaVA's own layout, it is Pangea's.
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
