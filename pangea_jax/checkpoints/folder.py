"""Finds the folder of a model, and loads parameters, tokenizer and reading policy from it."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from pangea_jax import assets
from pangea_jax.checkpoints import adapted, huggingface, orbax, rounded
from pangea_jax.checkpoints import config as config_file
from pangea_jax.checkpoints.adapted import AdapterFolder
from pangea_jax.checkpoints.config import PANGEA_TOKENS, image_token, read_config
from pangea_jax.checkpoints.files import CheckpointError
from pangea_jax.data import tokenizer as tokenizers
from pangea_jax.data.reader import POLICY_FILE, ReadingPolicy
from pangea_jax.model import Pangea, PangeaConfig
from pangea_jax.model.params import flatten, unflatten
from pangea_jax.sharding import quantized_part
from pangea_jax.work import paths
from pangea_jax.work.untrusted import parse_json

# The files of the model in the package, and the parts of the model in each.
SAMPLE_FILES = {
    "tower.safetensors": ("vision",),
    "model.safetensors": ("projector", "newline", "language"),
}
# Pickled weights are not fetched: unpickling runs code.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]


def resolve(
    name_or_path: str | os.PathLike, base: str | os.PathLike | None = None
) -> Path | AdapterFolder:
    """The folder of a model; downloads a model of the Hugging Face hub.

    Args:
      name_or_path: a folder (or .safetensors file), or `owner/name` on the hub. It may hold
        adapters of peft instead of a whole model.
      base: the model below the adapters, in the same forms, or "sample" for the model in the
        package; by default the one that the adapters name.

    Raises:
      FileNotFoundError: there is no such folder, and the name is not a hub name.
      CheckpointError: the hub cannot be reached, does not have the model, or asks for a login; or
        adapters name no base.
      ValueError: `base` is given for a whole model.
    """
    path = _fetched(name_or_path)
    if adapted.is_adapter(path):
        return _with_base(path, base)
    if base:
        raise ValueError(
            f"{name_or_path} is a whole model, so it takes no base; leave out base={base}"
        )
    return path


def split_parts(name: str) -> tuple[str, tuple[str, ...]]:
    """The folder and the parts of `DIR:vision+projector`; `gs://BUCKET/DIR` has no parts."""
    folder, _, parts = name.rpartition(":")
    return (folder, tuple(parts.split("+"))) if folder and "/" not in parts else (name, ())


def _with_base(folder: Path, base: str | os.PathLike | None = None) -> AdapterFolder:
    values = adapted.read_adapter_config(folder)
    named = base or values.get("base_model_name_or_path")
    if not named:
        raise CheckpointError(
            f"{folder / adapted.CONFIG} names no base_model_name_or_path; give the model below the "
            "adapters with base="
        )
    if not base and values.get("revision"):
        raise CheckpointError(
            f"{folder / adapted.CONFIG} names revision {values['revision']!r} of {named}; download that "
            "revision and give its folder with base="
        )
    if str(named) == "sample":
        return AdapterFolder(folder, assets.SAMPLE_MODEL)
    try:
        return AdapterFolder(folder, _fetched(named))
    except (FileNotFoundError, CheckpointError) as error:
        raise CheckpointError(
            f"{folder} holds adapters of {named}: {error}; give another place with base="
        ) from None


def _adapters_at(path: str | os.PathLike) -> AdapterFolder | None:
    """The adapters at a path and their base; None if there is a whole model."""
    if isinstance(path, AdapterFolder):
        return path
    return _with_base(paths.path(path)) if adapted.is_adapter(path) else None


def peek(name_or_path: str | os.PathLike) -> PangeaConfig:
    """The sizes of a model; of a model on the hub only config.json is fetched.

    Raises:
      FileNotFoundError, CheckpointError: as `resolve`; also if the hub is gone and has been there before.
    """
    return config_from_folder(_fetched(name_or_path, _fetch_config))


def _fetch_all(name: str) -> str:
    import huggingface_hub

    return huggingface_hub.snapshot_download(name, allow_patterns=_PATTERNS)


def _fetch_config(name: str) -> Path:
    import huggingface_hub

    # Forced, because a copy says nothing about whether the weights can be fetched.
    return Path(huggingface_hub.hf_hub_download(name, "config.json", force_download=True)).parent


def _fetched(
    name_or_path: str | os.PathLike, fetch: Callable[[str], str | Path] = _fetch_all
) -> Path:
    path, name = paths.expand(paths.path(name_or_path)), str(name_or_path)
    if path.exists():
        return path
    if paths.is_remote(path):
        raise FileNotFoundError(f"there is no folder {path}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(f"there is no folder {name}, and it is not a hub name (owner/name)")
    try:
        return Path(fetch(name))
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


def config_from_folder(path: str | os.PathLike) -> PangeaConfig:
    """The sizes of a model, see `pangea_jax.checkpoints.config`; for adapters those of their base."""
    found = _adapters_at(path)
    return config_file.config_from_folder(found.base if found else path)


def open_weights(
    path: str | os.PathLike, config: PangeaConfig | None, only: Sequence[str] | None = None
) -> adapted.Weights:
    """Opens a model's parameters to read any part of them; arguments and errors as for `load`."""
    config = config or config_from_folder(path)
    form, stored = config.language.weights, _stored_form(path)
    if form and form != stored:
        below = open_weights(path, rounded.plain(config), only)
        shapes = huggingface.shapes_of(config, only)
        lora = {name for name in shapes if "_lora." in name} - set(below.shapes)
        shapes = {name: shape for name, shape in shapes.items() if name not in lora}
        return rounded.QuantizedWeights(below, shapes, config)
    found = _adapters_at(path)
    if found and stored:
        raise CheckpointError(
            f"{found.base} has its weights in {stored}, into which no adapters are merged; give the model from "
            "which it was made with base="
        )
    if found:
        below = open_weights(found.base, config, only)
        adapters = adapted.Adapters(found.folder, config, huggingface.kernel_shapes(config))
        return adapted.AdaptedWeights(below, adapters, config)
    location = orbax.find(path)
    if location is not None:
        return _stored_by_orbax(location, config, only)
    if paths.path(path) == assets.SAMPLE_MODEL:
        wanted = huggingface.checked_parts(only)
        chosen = {
            file: [part for part in parts if part in wanted] for file, parts in SAMPLE_FILES.items()
        }
        return _Joined(
            huggingface.PublicWeights(assets.SAMPLE_MODEL / file, config, parts)
            for file, parts in chosen.items()
            if parts
        )
    return huggingface.PublicWeights(path, config, only)


def _stored_form(path: str | os.PathLike) -> str:
    """The form of the weights at a path, see `pangea_jax.model.quantized`; "" if no config.json says so."""
    try:
        return config_from_folder(path).language.weights
    except (FileNotFoundError, CheckpointError):
        return ""


def _stored_by_orbax(location: orbax.Location, config: PangeaConfig, only) -> adapted.Weights:
    """A model in our own form, or in a run. If the run's checkpoints lack frozen parameters, they are its base's."""
    shapes = huggingface.shapes_of(config, only)
    run = read_config(location.config.parent)[1] if location.trained else {}
    checkpoint = run.get("checkpoint")
    base = checkpoint.get("base") if isinstance(checkpoint, dict) else None
    if not base:
        return orbax.OrbaxArrays(location, shapes)
    frozen = re.compile("|".join(f"(?:{pattern})" for pattern in run["frozen"]))
    trained = {name: shape for name, shape in shapes.items() if not frozen.fullmatch(name)}
    try:
        folder = assets.SAMPLE_MODEL if base == "sample" else resolve(base)
        below = open_weights(folder, huggingface.without_adapters(config), only)
    except (FileNotFoundError, CheckpointError) as error:
        raise CheckpointError(
            f"{location.arrays} holds what was trained on {base}: {error}"
        ) from None
    return _Joined((below, orbax.OrbaxArrays(location, trained)))


class _Joined:
    """Parameters from several places; of two with the same name the later one. See `adapted.Weights`."""

    threads = 2

    def __init__(self, parts: Iterable[adapted.Weights]):
        self.shapes, self._files = {}, {}
        for part in parts:
            self._files |= dict.fromkeys(part.shapes, part)
            self.shapes |= part.shapes
            self.threads = min(self.threads, part.threads)

    def dtype(self, name: str) -> np.dtype:
        return self._files[name].dtype(name)

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        return self._files[name].read(name, index, dtype)


def _place(weights, name, dtype, sharding) -> jax.Array:
    """One parameter on its devices. The part of each device is read alone."""
    if quantized_part(name)[1]:  # codes and scales have their own
        dtype = None
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

    The config of a training run names it; for other models it is the model's own folder. Adapters
    may have their own, else it is that of their base.
    """
    if found := _adapters_at(path):
        own = any((found.folder / name).is_file() for name in tokenizers.FILES)
        return found.folder if own else tokenizer_files(found.base)
    if paths.path(path) == assets.SAMPLE_MODEL:
        return assets.EMOJI
    data = read_config(path)[1].get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    if named is None:
        return paths.path(path)
    return assets.EMOJI if named == "emoji" else paths.path(named)


def load_policy(path: str | os.PathLike) -> ReadingPolicy:
    """How the model in a folder reads conversations.

    The policy is in `reading.json` beside the weights, or in the config of a training run. A model
    without either was imported and reads like the reference.

    Raises:
      ValueError: the saved policy is damaged; the message names the file.
    """
    adapters, path = _adapters_at(path), paths.path(path)
    file = (path if path.is_dir() else path.parent) / POLICY_FILE
    if adapters and not file.is_file():
        return load_policy(adapters.base)
    if file.is_file():
        try:
            content = parse_json(file.read_text(encoding="utf-8"))
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
    files = paths.path(files or tokenizer_files(path))
    if found := _adapters_at(path):
        return load_tokenizer(found.base, files)
    try:
        return tokenizers.load_tokenizer(files, image_token(path))
    except tokenizers.NoImageToken:
        return tokenizers.load_tokenizer(files, PANGEA_TOKENS.image)
