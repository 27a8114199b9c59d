"""What the configs of the sample's own pretraining declare (configs/sample_tower.py, configs/sample_stage1.py)."""

import dataclasses

from pangea_jax.data.pipeline import PipelineConfig
from pangea_jax.data.reader import ReadingPolicy
from pangea_jax.model import PangeaConfig, VisionConfig
from pangea_jax.sample.augment import Views
from pangea_jax.sample.conversations import Plan
from pangea_jax.sharding import MeshConfig
from pangea_jax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TowerPhase:
    """A part of the tower's training.

    Attributes:
      only_sample: tells the concepts of the sample apart, and not all emoji.
      patch_loss: share of the loss of the classifier that reads all patches; that of their mean has the rest.
    """

    steps: int
    views: Views
    only_sample: bool
    patch_loss: float


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """How the vision tower learns to recognise drawings.

    Attributes:
      artists: whose drawings are trained on, ids of `sources.TOWER_ARTISTS`.
      test_artist: of the sample, whose drawings are only for the test.
      first, last: the two phases. The schedule of the learning rate goes over both.
      label_smoothing: share of the target that is spread over all classes.
    """

    artists: tuple[str, ...]
    test_artist: str
    vision: VisionConfig
    first: TowerPhase
    last: TowerPhase
    batch_size: int
    optimizer: OptimizerConfig
    label_smoothing: float
    seed: int = 0
    log_every: int = 100

    @property
    def steps(self) -> int:
        return self.first.steps + self.last.steps


@dataclasses.dataclass(frozen=True)
class Stage1Config:
    """How decoder and projector learn to translate names and to answer questions about pictures in English.

    Attributes:
      languages: of the conversations without pictures.
      sources: of the pictures that are asked about in English.
      text_passes, picture_passes: how often each conversation without pictures and each picture is seen.
      plan: the conversations about pictures.
      text_plan: the conversations with names in place of pictures.

    The other fields mean the same as in `pangea_jax.experiment.Experiment`.
    """

    model: PangeaConfig
    reading: ReadingPolicy
    pipeline: PipelineConfig
    optimizer: OptimizerConfig
    languages: tuple[str, ...]
    sources: tuple[str, ...]
    text_passes: int
    picture_passes: int
    augmented_views: int
    plan: Plan = Plan()
    text_plan: Plan = Plan()
    frozen: tuple[str, ...] = ()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    log_every: int = 20

    @property
    def artists(self) -> tuple[str, ...]:
        """The artists of the sources, such as "emoji/noto"."""
        return tuple(source.removeprefix("emoji/") for source in self.sources)
