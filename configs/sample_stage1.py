"""Stage 1 of the sample model: pretraining before multimodal fine-tuning.

    python launch/pretrain_sample.py --config=configs/sample_stage1.py --workdir=runs/sample_stage1

Pangea starts from Qwen2, a decoder that knows its languages, and from a first stage on English
captions (section 4.1 of the paper). This run does both for the sample model at once. The model learns
to translate the names of 283 things between the 8 default languages, all pairs equally often. These
examples have only text: a translation question, or a question about an image with a name in place of
the image. The model also learns to answer questions about images, but only in English. The 141,820
conversations took 7 minutes on two CPU cores that other work shared. The package contains the result
as `pangea_jax/assets/sample_model/stage1.safetensors`.
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
        translation_passes=1,
        picture_passes=60,
        augmented_views=base.augmented_views,
        reading=base.reading,
        optimizer=base.optimizer,
        mesh=base.mesh,
    )
    config.pipeline.update(
        rows=8,
        row_tokens=288,
        row_tiles=10,
        max_targets=80,
        packing="balanced",
        examples_per_row=8,
    )
    # All kinds of question are learned here, in English.
    config.plan.update(describe=0.7, is_it=0.3, letter=0.3, kind=0.05, two_pictures=0.15)
    config.optimizer.learning_rate = 3e-3
    return config
