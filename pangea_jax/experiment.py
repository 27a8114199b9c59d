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
from absl import logging
from flax import nnx
from jaxtyping import Float

from pangea_jax import assets, checkpoints, sharding
from pangea_jax.batch import Batch
from pangea_jax.checkpoints import adapter, huggingface, processor
from pangea_jax.checkpoints.folder import split_parts
from pangea_jax.data import holdout, mixture, pipeline
from pangea_jax.data.feed import Feed
from pangea_jax.data.mixture import Choice, Mixture
from pangea_jax.data.pipeline import PipelineConfig
from pangea_jax.data.reader import CachedFeatures, Geometry, Reader, ReadingPolicy, Tiles
from pangea_jax.data.store import RecordStore
from pangea_jax.data.tokenizer import Tokenizer, load_tokenizer
from pangea_jax.model import AttentionImpl, Pangea, PangeaConfig, VisionTower
from pangea_jax.model import params as model_params
from pangea_jax.sample import emoji
from pangea_jax.sample.conversations import Plan
from pangea_jax.sample.evaluation import Evaluation
from pangea_jax.sample.features import frozen_features
from pangea_jax.sample.sample_store import SampleStore
from pangea_jax.sharding import MeshConfig
from pangea_jax.train.flops import train_flops
from pangea_jax.train.guards import GuardConfig
from pangea_jax.train.optimizer import OptimizerConfig
from pangea_jax.train.state import TrainState
from pangea_jax.train.step import make_train_step
from pangea_jax.train.validation import Validator, make_score
from pangea_jax.work import paths

# Weights in the package: their name in `Experiment.pretrained` -> (file, parts of the model in it).
PRETRAINED = {
    "tower": ("tower.safetensors", ("vision",)),
    "model": ("model.safetensors", ("projector", "newline", "language")),
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
      plan: which conversations the embedded sample has; other stores have their own records.
    """

    store: str
    tokenizer: str
    image_id: int | None = None
    verify: bool = False
    plan: Plan = Plan()


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the training state is saved.

    Attributes:
      every: steps between two checkpoints.
      keep: number of newest checkpoints to keep.
      keep_every: also keep every checkpoint at a multiple of this number of steps; 0: none.
      base: the model that all frozen parameters come from. Checkpoints then hold the others and this
        name; "": they hold everything. `on_base` corrects it to what a run starts from.
    """

    every: int = 250
    keep: int = 2
    keep_every: int = 0
    base: str = ""


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Which records are held back from training, and how often the loss on them is computed.

    At most one of `fraction`, `number`, `ids` and `store` is set; without any, nothing is held back.
    No picture is on both sides (`pangea_jax.data.holdout`).

    Attributes:
      fraction: share of the records that the mixture may draw.
      number: number of these records.
      ids: ids of records.
      store: a folder with another store. Training leaves out records that show one of its pictures
        (the same key and the same bytes).
      every: steps between two validations, besides those before the first and after the last step;
        None: ten in a run.

    Raises:
      ValueError: a value is out of range, or two ways are set.
    """

    fraction: float = 0.0
    number: int = 0
    ids: tuple[str, ...] = ()
    store: str = ""
    every: int | None = None

    def __post_init__(self):
        if not 0 <= self.fraction < 1:
            raise ValueError(
                f"config.validation.fraction is {self.fraction}; expected a share of at least 0 and below 1"
            )
        if self.number < 0 or (self.every is not None and self.every < 1):
            raise ValueError(
                f"config.validation.number {self.number} must be 0 or more, and every {self.every} 1 or more"
            )
        if isinstance(self.ids, str):  # would become a tuple of letters
            raise ValueError(f"config.validation.ids must be a tuple of ids, not {self.ids!r}")
        ways = [name for name in ("fraction", "number", "ids", "store") if getattr(self, name)]
        if len(ways) > 1:
            raise ValueError(f"config.validation.{ways[0]} and {ways[1]} are both set; unset one")

    @property
    def is_on(self) -> bool:
        return bool(self.fraction or self.number or self.ids or self.store)


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """How a run asks itself PangeaBench; `config.eval.bench`. `launch/bench_of_a_run.py` does it.

    Attributes:
      tasks: names as in `eval/run.py --tasks`, with commas; "": nothing is asked. Data sets that need a judge are
        refused.
      data: the folder of the documents, see eval/bench/documents.py.
      limit: documents of each task, or a share below 1; None: all.
      every: steps between two evaluations on a small part, besides the one of everything at the end;
        0: none. The last step is one of them.
      every_limit: number of documents of each task in these.
      seed: for the choice of these documents. It is not `config.seed`, so that runs are comparable.
      profile: "fixed" or "paper", see docs/evaluation.md.
      batch_size: number of rows in a batch; None: as many as the memory holds.
      max_new_tokens: length of the longest answer; None: each task's own.

    Raises:
      ValueError: a value is out of range.
    """

    tasks: str = ""
    data: str = "data/pangeabench"
    limit: float | None = None
    every: int = 0
    every_limit: int = 20
    seed: int = 0
    profile: str = "fixed"
    batch_size: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self):
        least = {"every": 0, "every_limit": 1, "batch_size": 1, "max_new_tokens": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"config.eval.bench.{name} is {value}; expected {lowest} or more")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"config.eval.bench.limit is {self.limit}; expected more than 0")


@dataclasses.dataclass(frozen=True)
class EvalConfig(Evaluation):
    """What a run is asked at its end: PangeaBench, or else, if it trains on the sample, the sample's questions.

    Attributes:
      bench: the tasks of PangeaBench; None: the sample's questions instead.
    """

    bench: BenchConfig | None = None


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
      init_from: a finished run, a model or adapters to start from, instead of `pretrained`: weights
        only, with a fresh optimiser. `launch/train.py --init_from` sets it.
      frozen: patterns of parameters that do not train.
      keep: what blocks keep for the backward pass, see `pangea_jax.model.layers.KEEP`.
      accumulation: number of parts of a batch, computed one after the other.
      steps: number of steps; None: one epoch.
      log_every: steps between two log lines.
      wandb: project name of Weights & Biases; "": it is not used.
      validation: the part of the records that is held back, and how often it is scored.
      eval: how the run evaluates itself; None: not at all.

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
    init_from: str = ""
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
    eval: EvalConfig | None = None
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self):
        counts = {name: getattr(self, name) for name in ("steps", "log_every", "accumulation")}
        counts |= {
            f"checkpoint.{name}": getattr(self.checkpoint, name) for name in ("every", "keep")
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"config.{name} is {count}; expected a number of 1 or more")
        if self.eval and not self.eval.bench and self.data.store != "emoji":
            raise ValueError(
                'config.eval asks about the embedded sample, but config.data.store is not "emoji"; set '
                "config.eval.bench, or config.eval=None"
            )
        if self.augmented_views and (self.model.pinpoints or self.reading.multi_image == "padded"):
            raise ValueError(
                "config.augmented_views works only with one tile per picture; set "
                'config.model.pinpoints=() and config.reading.multi_image="anyres", or augmented_views=0'
            )
        if self.augmented_views and self.validation.store:
            raise ValueError(
                "config.validation.store needs the tower at every step; set config.augmented_views=0, or hold "
                "back a fraction"
            )


def open_data(exp: Experiment) -> tuple[RecordStore, Tokenizer]:
    """The store of records and the tokenizer.

    Raises:
      ValueError: the model's vocabulary is smaller than the tokenizer's.
    """
    data = exp.data
    store = SampleStore(data.plan) if data.store == "emoji" else RecordStore(data.store)
    if data.verify:
        store.verify()
    path = assets.EMOJI if data.tokenizer == "emoji" else paths.path(data.tokenizer)
    tokenizer = load_tokenizer(path, data.image_id)
    wanted = exp.model.language.vocab_size
    if tokenizer.vocab_size > wanted:
        raise ValueError(
            f"config.model.language.vocab_size is {wanted}, the tokenizer in {data.tokenizer} has "
            f"{tokenizer.vocab_size} tokens"
        )
    return store, tokenizer


def choose_records(exp: Experiment, store: RecordStore) -> Choice:
    """The records to train on, and those that `config.validation` holds back.

    Raises:
      ValueError: see `pangea_jax.data.holdout` and `pangea_jax.data.mixture.choose`.
    """
    wanted, left_out, held, dropped = exp.validation, None, None, 0
    if wanted.is_on:
        usable = mixture.usable(store.index, exp.mixture)
        if wanted.store:
            left_out = holdout.shared_with(store, usable, RecordStore(wanted.store))
            dropped = int(left_out.sum())
        else:
            if wanted.ids:
                found = holdout.by_ids(store, usable, wanted.ids)
            else:
                number = wanted.number or max(1, round(wanted.fraction * int(usable.sum())))
                found = holdout.draw(store, usable, number=number, seed=exp.seed)
            held, left_out, dropped = found.rows, found.left_out, found.dropped
        said = "validation: %d of %d records are held back; %d more do not train, as they show a held-back picture"
        logging.info(said, 0 if held is None else len(held), usable.sum(), dropped)
    choice = mixture.choose(store.index, exp.mixture, exp.seed, left_out=left_out)
    return dataclasses.replace(choice, held_back=held, dropped=dropped)


def make_validator(
    exp: Experiment,
    store: RecordStore,
    choice: Choice,
    reader: Reader,
    graphdef: nnx.GraphDef,
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
    steps: int,
) -> Validator | None:
    """What scores the held-back records; None without `config.validation`.

    It has many parameters because it joins the data, the step and the mesh.

    Args:
      reader: of the training.
      steps: of the whole run.
    """
    wanted = exp.validation
    if not wanted.is_on:
        return None
    rows = choice.held_back
    if wanted.store:
        store = RecordStore(wanted.store)
        rows = np.arange(len(store.index))
        reader = make_reader(exp, store, reader.tokenizer)
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    held = holdout.HeldBack(store, rows, reader, exp.pipeline, **processes)
    logging.info(
        "%d of %d held-back records are scored: %s",
        held.examples,
        len(rows),
        ", ".join(held.languages),
    )
    score = make_score(
        graphdef,
        shardings,
        mesh,
        len(held.languages),
        max_targets=exp.pipeline.max_targets,
        impl=exp.attention,
    )
    every = wanted.every or max(1, steps // 10)
    return Validator(score, held, held.languages, mesh, every)


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
            folder, chosen = split_parts(name)
            path, parts = checkpoints.resolve(folder), chosen or None
        loaded = checkpoints.load(path, model, only=parts, shardings=shardings)
        params |= model_params.flatten(loaded)
    return params


def load_initial(exp: Experiment, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The parameters from which a run starts, by name: those of `config.init_from`, else pretrained ones.

    Adapters start again if a run or a peft folder has the same (rank, alpha, targets) as the config.
    Otherwise they are merged into their kernels, if the config has none or others.

    Raises:
      CheckpointError: the weights do not fit the config.
    """
    if not exp.init_from:
        return load_pretrained(exp.model, exp.pretrained, mesh)
    path, model = _resolve_initial(exp), exp.model
    if isinstance(path, checkpoints.AdapterFolder) and model.language.lora.rank:
        params = load_pretrained(model, (str(path.base),), mesh)
        return params | adapter.load(path.folder, model)
    theirs = checkpoints.config_from_folder(path).language.lora
    if theirs.rank and theirs != model.language.lora:
        path = paths.path(path) / "model"  # with the adapters merged
        if not path.is_dir():
            raise checkpoints.CheckpointError(
                f"{exp.init_from} trains adapters of {theirs}, the config has {model.language.lora}; let that "
                "run end, so that it writes model/ with the adapters merged, or set "
                "config.model.language.lora as there"
            )
    shapes = model_params.abstract(lambda: Pangea(model, rngs=nnx.Rngs(0)))[1]
    shardings = model_params.unflatten(sharding.param_shardings(shapes, mesh))
    return model_params.flatten(checkpoints.load(path, model, shardings=shardings))


# What must be equal in two models for one to start from the other's weights.
_SIZES = {
    "language": ("width", "layers", "heads", "kv_heads", "head_width", "mlp", "vocab_size"),
    "vision": ("width", "heads", "mlp", "patch_size"),
}


def _resolve_initial(exp: Experiment):
    """The folder of `init_from`, whose model has the sizes of this run's."""
    try:
        path = checkpoints.resolve(exp.init_from)
        theirs = checkpoints.config_from_folder(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--init_from={exp.init_from}: {error}; expected a finished run, a model or adapters"
        ) from error
    for part, names in _SIZES.items():
        for name in names:
            found, wanted = (getattr(getattr(one, part), name) for one in (theirs, exp.model))
            if found != wanted:
                raise checkpoints.CheckpointError(
                    f"--init_from={exp.init_from} has {part}.{name} {found}, but the model of this run has {wanted}; "
                    "start from a run of the same model, or configure this run with that model"
                )
    return path


def on_base(exp: Experiment) -> Experiment:
    """The same with the one model as `checkpoint.base` that the run starts from, also with `init_from`; without one "".

    Raises:
      CheckpointError, FileNotFoundError: the model of `init_from` is not there or damaged.
    """
    if not exp.checkpoint.base:
        return exp
    base = adapter.base_of(dataclasses.asdict(exp))
    return dataclasses.replace(exp, checkpoint=dataclasses.replace(exp.checkpoint, base=base))


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


def save_model(
    exp: Experiment, params: Mapping[str, jax.Array], tokenizer: Tokenizer, workdir: Path
) -> None:
    """Writes model/: weights, config, tokenizer, processor, reading policy; and adapters alone into adapter/.

    On a base in 8 or 4 bits it writes adapter/ alone, because adapters are merged into the weights before the rounding.
    If no public layout can hold the tokenizer, it warns and leaves out tokenizer and processor. All
    processes must call it.
    """
    folder, lora = workdir / "model", exp.model.language.lora
    tokens = checkpoints.SpecialTokens.of(tokenizer)
    if not (lora.rank and exp.model.language.weights):
        huggingface.save(model_params.unflatten(params), exp.model, folder, tokens=tokens)
    if lora.rank:
        base = adapter.base_of(dataclasses.asdict(exp))
        adapter.save(params, lora, workdir / "adapter", base=base, policy=exp.reading)
    if jax.process_index():
        return
    if not folder.is_dir():
        logging.info(
            "the base is in %s, so only adapter/ is written; launch/convert.py --format=hf merges it into its base",
            exp.model.language.weights,
        )
        return
    exp.reading.save(folder)
    try:
        files = checkpoints.tokenizer_files(workdir)
        for note in processor.write(folder, exp.model, tokenizer, files):
            logging.info("%s: %s", folder, note)
    except ValueError as error:
        logging.warning("%s has no tokenizer: %s", folder, error)
