"""The vision tower of the sample model, trained on emoji artwork; its role is that of CLIP.

    python launch/pretrain_tower.py --config=configs/sample_tower.py --workdir=runs/sample_tower

A ViT of CLIP's form (4 blocks, width 128, patches of 8 on 48 pixels) learns to tell 283 things
apart, from augmented views of drawings by four artists. The fifth artist, Twemoji, appears only in
the one test at the end. Writes `tower.safetensors`, shipped as
`pangea_jax/assets/emoji/tower.safetensors`.
"""

from ml_collections import ConfigDict

from configs import sample


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.artists = ("noto", "fluent", "emojione", "openmoji")
    config.test_artist = "twemoji"
    config.vision = sample.get_config().model.vision
    config.steps = 4500
    config.batch_size = 128
    config.learning_rate = 1e-3
    config.warmup_steps = 300
    config.weight_decay = 0.05
    config.label_smoothing = 0.1
    config.seed = 0
    config.log_every = 100
    return config
