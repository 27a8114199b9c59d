"""The vision tower of the sample model, trained on emoji artwork. It takes the place of CLIP.

    python launch/pretrain_tower.py --config=configs/sample_tower.py --workdir=runs/sample_tower
    python launch/ship_sample.py tower runs/sample_tower

A ViT of CLIP's form (4 blocks, width 160, patches of 16 on 64 pixels) learns to name drawings by ten
artists (`sources.TOWER_ARTISTS`), in random views. npm downloads them; `--packages=DIR` reads archives that are
already there. Drawings of Twemoji are used only in the test at the end.

First phase: all 1,406 emoji that at least three artists draw, strong views. A classifier of all patches side by side
teaches fastest, but a decoder cannot read the features that it leads to; one of their mean makes them mean the same
everywhere. Last phase: the 283 concepts of the sample, mild views, the mean alone. In the end the features get unit
scale.

Muon took fewer steps than AdamW: on the sample's concepts, without OpenMoji, the loss after 300 steps was 8.8 against
9.6, and a step took 20 % longer. With a two-layer classifier instead of that of all patches it was 9.9, and a linear
probe was worse.

Expect about 30 minutes on two idle CPU cores (0.44 s of CPU time a step). Of Twemoji's drawings 76.7 % are named right
out of 283, and 92.2 % within five; of the artists it learned from, 99 to 100 %. A linear probe of the mean of the patch
features names 91.5 % of new views. `results.json` holds them all.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from configs import sample
from pangea_jax.sample import augment
from pangea_jax.sample.pretraining import TowerConfig
from pangea_jax.sample.sources import TOWER_ARTISTS
from pangea_jax.typed_config import section


def get_config() -> ConfigDict:
    config = section(
        TowerConfig,
        artists=tuple(artist.id for artist in TOWER_ARTISTS),
        test_artist="twemoji",
        vision=sample.get_config().model.vision,
        first=dict(steps=5200, views=asdict(augment.STRONG), only_sample=False, patch_loss=0.5),
        last=dict(steps=2800, views=asdict(augment.MILD), only_sample=True, patch_loss=0.0),
        batch_size=128,
        label_smoothing=0.1,
    )
    config.optimizer.update(
        name="muon", learning_rate=3e-3, warmup_ratio=0.03, b2=0.98, weight_decay=0.05
    )
    return config
