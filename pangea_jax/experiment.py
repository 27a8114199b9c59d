"""An experiment: everything that a config of launch/train.py declares, and the functions that build it.

Training, compiling ahead of time, inspection and benchmarks all use this module. Config files fill
`Experiment` with `pangea_jax.typed_config.section`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float

from pangea_jax import assets, checkpoints, sharding
from pangea_jax.batch import Batch
from pangea_jax.checkpoints import huggingface
from pangea_jax.data import mixture, pipeline
from pangea_jax.data.feed import Feed
from pangea_jax.data.mixture import Choice, Mixture
from pangea_jax.data.pipeline import PipelineConfig
from pangea_jax.data.reader import CachedFeatures, Geometry, Reader, ReadingPolicy, Tiles
from pangea_jax.data.store import RecordStore
from pangea_jax.data.tokenizer import Tokenizer, load_tokenizer
from pangea_jax.model import AttentionImpl, Pangea, PangeaConfig, VisionTower
from pangea_jax.model import params as model_params
from pangea_jax.sample import emoji
from pangea_jax.sample.features import frozen_features
from pangea_jax.sample.naming import Evaluation
from pangea_jax.sharding import MeshConfig
from pangea_jax.train.flops import train_flops
from pangea_jax.train.guards import GuardConfig
from pangea_jax.train.optimizer import OptimizerConfig
from pangea_jax.train.step import make_train_step

# Weights in the package: their name in `Experiment.pretrained` -> (file, parts of the model in it).
PRETRAINED = {
    "tower": ("tower.safetensors", ("vision",)),
    "stage1": ("stage1.safetensors", ("projector", "newline", "language")),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the records are.

    Attributes:
      store: a folder made by launch/build_data.py; "emoji" is the embedded sample.
      tokenizer: folder or file of the tokenizer; "emoji" is the sample's.
      image_id: token id of `<image>`, if the tokenizer does not define it.
      verify: check the store's checksums before training.
    """

    store: str
    tokenizer: str
    image_id: int | None = None
    verify: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the training state is saved.

    Attributes:
      every: steps between two checkpoints.
      keep: number of newest checkpoints to keep.
      keep_every: also keep every checkpoint at a multiple of this number of steps; 0: none.
    """

    every: int = 250
    keep: int = 2
    keep_every: int = 0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a config of launch/train.py declares.

    Attributes:
      title: the name of the run in figures.
      seed: for the choice and order of the records, and the initial values.
      augmented_views: number of random views of each picture whose features are computed before
        training, for a frozen tower and few pictures; 0: the tower runs at every step.
      pretrained: weights to start from, loaded in this order: names of `PRETRAINED`, folders, or
        names on the Hugging Face hub. "NAME:vision+language" loads only these parts.
      frozen: patterns of parameters that do not train.
      keep: what blocks keep for the backward pass, see `pangea_jax.model.layers.KEEP`.
      accumulation: number of parts of a batch, computed one after the other.
      steps: number of steps; None: one epoch.
      log_every: steps between two log lines.
      wandb: project name of Weights & Biases; "": it is not used.
      eval: settings of the sample's naming task at the end; None: no evaluation.

    Raises:
      ValueError: values contradict each other, or a count is below 1.
    """

    title: str
    data: DataConfig
    mixture: Mixture
    pipeline: PipelineConfig
    model: PangeaConfig
    reading: ReadingPolicy = ReadingPolicy()
    seed: int = 0
    augmented_views: int = 0
    pretrained: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    attention: AttentionImpl = AttentionImpl()
    keep: str = "none"
    accumulation: int = 1
    mesh: MeshConfig = MeshConfig()
    steps: int | None = None
    log_every: int = 10
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardConfig = GuardConfig()
    wandb: str = ""
    eval: Evaluation | None = None

    def __post_init__(self):
        counts = {name: getattr(self, name) for name in ("steps", "log_every", "accumulation")}
        counts |= {
            f"checkpoint.{name}": getattr(self.checkpoint, name) for name in ("every", "keep")
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"config.{name} is {count}; expected a number of 1 or more")
        if self.augmented_views and (self.model.pinpoints or self.reading.multi_image == "padded"):
            raise ValueError(
                "config.augmented_views works only with one tile per picture; set "
                'config.model.pinpoints=() and config.reading.multi_image="anyres", or augmented_views=0'
            )


def open_data(exp: Experiment) -> tuple[RecordStore, Tokenizer]:
    """The store of records and the tokenizer.

    Raises:
      ValueError: the model's vocabulary is smaller than the tokenizer's.
    """
    data = exp.data
    store = emoji.open_store() if data.store == "emoji" else RecordStore(data.store)
    if data.verify:
        store.verify()
    path = assets.EMOJI if data.tokenizer == "emoji" else Path(data.tokenizer)
    tokenizer = load_tokenizer(path, data.image_id)
    wanted = exp.model.language.vocab_size
    if tokenizer.vocab_size > wanted:
        raise ValueError(
            f"config.model.language.vocab_size is {wanted}, the tokenizer in {data.tokenizer} has "
            f"{tokenizer.vocab_size} tokens"
        )
    return store, tokenizer


def choose_records(exp: Experiment, store: RecordStore) -> Choice:
    """The records to train on."""
    return mixture.choose(store.index, exp.mixture, exp.seed)


def make_reader(
    exp: Experiment,
    store: RecordStore,
    tokenizer: Tokenizer,
    features: Mapping[str, Float[np.ndarray, "views P E"]] | None = None,
) -> Reader:
    """The reader of the records. Pictures are tiles, or `features` of `cached_features`."""
    if features is None:
        return Reader(tokenizer, Tiles(Geometry.of(exp.model), exp.reading, store))
    return Reader(tokenizer, CachedFeatures(features, exp.reading, newline=exp.model.newline))


def make_feed(
    exp: Experiment,
    store: RecordStore,
    choice: Choice,
    reader: Reader,
    *,
    approximate_restart: bool = False,
) -> Feed:
    """The batches of training; each process gets its own rows."""
    return pipeline.train_dataset(
        pipeline.RowSource(store, choice.rows),
        reader,
        exp.pipeline,
        seed=exp.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        approximate_restart=approximate_restart,
    )


def artists(exp: Experiment) -> tuple[str, ...]:
    """The artists among the embedded sample's sources, such as "noto" of "emoji/noto".

    Raises:
      ValueError: the config names no sources.
    """
    if not exp.mixture.sources:
        raise ValueError(
            "config.mixture.sources names no artist, such as ('emoji/noto',); config.eval and "
            "config.augmented_views need them"
        )
    return tuple(source.removeprefix("emoji/") for source in exp.mixture.sources)


def load_pretrained(
    model: PangeaConfig, names: Sequence[str], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """Pretrained parameters by name, each on the devices where it will train.

    Args:
      names: see `Experiment.pretrained`.
    """
    shapes = model_params.abstract(lambda: Pangea(model, rngs=nnx.Rngs(0)))[1]
    shardings = model_params.unflatten(sharding.param_shardings(shapes, mesh))
    params, model = {}, huggingface.without_adapters(model)
    for name in names:
        if name in PRETRAINED:
            file, parts = PRETRAINED[name]
            path = assets.SAMPLE_MODEL / file
        else:
            folder, _, chosen = name.partition(":")
            path, parts = checkpoints.resolve(folder), chosen.split("+") if chosen else None
        loaded = checkpoints.load(path, model, only=parts, shardings=shardings)
        params |= model_params.flatten(loaded)
    return params


def frozen_tower(exp: Experiment, pretrained: Mapping[str, jax.Array]) -> VisionTower:
    """The pretrained, frozen tower of `augmented_views`.

    Raises:
      ValueError: the tower is not pretrained, or not frozen.
    """
    graphdef, shapes = model_params.abstract(
        lambda: VisionTower(exp.model.vision, rngs=nnx.Rngs(0))
    )
    names = {name: f"vision.{name}" for name in shapes}
    missing = set(names.values()) - set(pretrained)
    if missing or set(names.values()) - model_params.select(names.values(), exp.frozen):
        raise ValueError(
            "config.augmented_views needs a frozen, pretrained tower: add the tower to "
            'config.pretrained and "vision\\..*" to config.frozen, or set augmented_views=0'
        )
    params = {name: pretrained[full].astype(jnp.float32) for name, full in names.items()}
    return model_params.merge(graphdef, params)


def cached_features(
    exp: Experiment,
    pretrained: Mapping[str, jax.Array],
    store: RecordStore,
    mesh: jax.sharding.Mesh,
    cache: Path | None = None,
) -> dict[str, Float[np.ndarray, "views P E"]]:
    """Features of the sample's pictures, for `augmented_views` above 0.

    Args:
      cache: see `pangea_jax.sample.features.frozen_features`.
    """
    return frozen_features(
        frozen_tower(exp, pretrained),
        store,
        emoji.picture_keys(store, artists(exp)),
        mesh,
        exp.reading,
        augmented=exp.augmented_views,
        seed=exp.seed,
        cache=cache,
    )


def make_step(
    exp: Experiment,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    shardings,
    mesh: jax.sharding.Mesh,
) -> Callable:
    """The compiled training step, see `make_train_step`."""
    return make_train_step(
        graphdef,
        optimizer,
        shardings,
        mesh,
        max_targets=exp.pipeline.max_targets,
        keep=exp.keep,
        impl=exp.attention,
        accumulation=exp.accumulation,
    )


def number_of_steps(exp: Experiment, feed: Feed) -> int:
    """Number of steps: `config.steps`, or the whole epoch.

    Raises:
      ValueError: the length of the epoch is unknown, too short, or zero.
    """
    wanted, there = exp.steps, feed.num_batches
    if there is None and not wanted:
        raise ValueError(
            f'the number of steps of packing "{exp.pipeline.packing}" is unknown; set config.steps, '
            'or pipeline.packing to "planned", "balanced" or "none"'
        )
    if there is not None and (wanted or 1) > there:
        raise ValueError(
            f"the chosen examples make {there} steps of {exp.pipeline.rows} rows, "
            f"not {wanted or 1}; lower config.steps or pipeline.rows, or raise mixture.num_examples"
        )
    return wanted or there


def step_flops(
    exp: Experiment, shapes: Mapping[str, jax.ShapeDtypeStruct], rows: int
) -> dict[str, float]:
    """Model FLOPs of a step on `rows` rows, padding included, see `train_flops`.

    Args:
      shapes: shapes of all parameters by name.
    """
    batch = exp.pipeline
    return train_flops(
        exp.model,
        shapes,
        tokens=rows * batch.row_tokens,
        row_tokens=batch.row_tokens,
        tiles=0 if exp.augmented_views else rows * batch.row_tiles,
        targets=rows * (batch.max_targets or batch.row_tokens),
        frozen=exp.frozen,
    )


def batch_shapes(exp: Experiment, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes of a step's batch, with rows added until the devices share them evenly."""
    config, shards, vision = exp.pipeline, sharding.row_shards(mesh), exp.model.vision
    rows = -(-config.rows // shards) * shards
    placed = jax.sharding.NamedSharding(mesh, sharding.BATCH_SPEC)
    array = functools.partial(jax.ShapeDtypeStruct, sharding=placed)
    words = array((rows, config.row_tokens), jnp.int32)
    names = ("tokens", "image_index", "positions", "segment_ids", "targets")
    fields = dict.fromkeys(names, words)
    fields["weights"] = array((rows, config.row_tokens), jnp.float32)
    if exp.augmented_views:
        features = (rows, config.row_tiles, vision.patches, vision.width)
        return Batch(**fields, features=array(features, exp.model.dtype))
    tiles = (rows, config.row_tiles, vision.image_size, vision.image_size, 3)
    return Batch(**fields, tiles=array(tiles, jnp.uint8))
