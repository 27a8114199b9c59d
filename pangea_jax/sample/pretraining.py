"""What the configs of the sample's own pretraining declare (configs/sample_tower.py, configs/sample_stage1.py)."""

import dataclasses

from pangea_jax.data.pipeline import PipelineConfig
from pangea_jax.data.reader import ReadingPolicy
from pangea_jax.model import PangeaConfig, VisionConfig
from pangea_jax.sharding import MeshConfig
from pangea_jax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """How the vision tower learns to recognise drawings.

    Attributes:
      artists: whose drawings are trained on.
      test_artist: whose drawings are only for the test.
      warmup_steps: steps in which the learning rate rises to `learning_rate`.
      label_smoothing: share of the target that is spread over all concepts.
    """

    artists: tuple[str, ...]
    test_artist: str
    vision: VisionConfig
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    label_smoothing: float
    seed: int = 0
    log_every: int = 100


@dataclasses.dataclass(frozen=True)
class Stage1Config:
    """How decoder and projector learn to translate names and to name pictures in English.

    Attributes:
      languages: to translate between.
      sources: of the pictures that are named in English.
      translation_passes, picture_passes: how often each translation and each picture is seen.

    The other fields mean the same as in `pangea_jax.experiment.Experiment`.
    """

    model: PangeaConfig
    reading: ReadingPolicy
    pipeline: PipelineConfig
    optimizer: OptimizerConfig
    languages: tuple[str, ...]
    sources: tuple[str, ...]
    translation_passes: int
    picture_passes: int
    augmented_views: int
    frozen: tuple[str, ...] = ()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    log_every: int = 20

    @property
    def artists(self) -> tuple[str, ...]:
        """The artists of the sources, such as "emoji/noto"."""
        return tuple(source.removeprefix("emoji/") for source in self.sources)
