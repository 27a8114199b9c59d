"""Stage 1 of the sample model: pretraining before multimodal fine-tuning.

    python launch/pretrain_sample.py --config=configs/sample_stage1.py --workdir=runs/sample_stage1

Pangea starts from Qwen2, a decoder that knows its languages, and from a first stage on English
captions (section 4.1 of the paper). This run does both for the sample model at once.

- Without pictures, in the 8 default languages: translations of the names of 283 things between every
  two languages, and questions about pictures with names in place of the pictures.
- With pictures, in English only: the conversations of the sample.

The 157,586 conversations took 21 minutes on two CPU cores that other work shared. The package contains
the result as `pangea_jax/assets/sample_model/stage1.safetensors`.
"""

from ml_collections import ConfigDict

from configs import sample
from pangea_jax.sample.pretraining import Stage1Config
from pangea_jax.typed_config import section


def get_config() -> ConfigDict:
    base = sample.get_config()
    config = section(
        Stage1Config,
        model=base.model,
        frozen=base.frozen,
        languages=base.mixture.languages,
        sources=base.mixture.sources,
        text_passes=1,
        picture_passes=80,
        augmented_views=base.augmented_views,
        reading=base.reading,
        optimizer=base.optimizer,
        mesh=base.mesh,
    )
    config.pipeline.update(
        rows=16,
        row_tokens=304,
        row_tiles=6,
        max_targets=88,
        packing="balanced",
        examples_per_row=4,
    )
    asked = dict(name_first=0.2, is_it=0.8, letter=0.8, kind=0.1, two_pictures=0.2)
    config.plan.update(describe=0.6, **asked)
    config.text_plan.update(varieties=10, describe=0.0, other_words=0.0, **asked)
    config.optimizer.learning_rate = 3e-3
    return config
