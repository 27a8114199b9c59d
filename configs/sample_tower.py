"""The vision tower of the sample model, trained on emoji artwork. It takes the place of CLIP.

    python launch/pretrain_tower.py --config=configs/sample_tower.py --workdir=runs/sample_tower

A ViT of CLIP's form (4 blocks, width 128, patches of 8 on 48 pixels) learns to tell 283 things
apart, from augmented views of drawings by four artists. Drawings of the fifth artist, Twemoji, are
used only in the test at the end. The package contains the result as
`pangea_jax/assets/sample_model/tower.safetensors`.
"""

from ml_collections import ConfigDict

from configs import sample
from pangea_jax.sample.pretraining import TowerConfig
from pangea_jax.typed_config import section


def get_config() -> ConfigDict:
    return section(
        TowerConfig,
        artists=("noto", "fluent", "emojione", "openmoji"),
        test_artist="twemoji",
        vision=sample.get_config().model.vision,
        steps=4500,
        batch_size=128,
        learning_rate=1e-3,
        warmup_steps=300,
        weight_decay=0.05,
        label_smoothing=0.1,
    )
