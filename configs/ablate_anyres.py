"""Do tiles help? Any-resolution canvases against one view per image. The paper does not vary this.

    python launch/sweep.py --config=configs/ablate_anyres.py --workdir=runs/anyres --submit=tpu --dry_run

`off` shows each image as one view of 336 x 336 (577 tokens). `on` shows it as up to five views, on
LLaVA-NeXT's canvases (up to 2,928 tokens). Both see the same examples in the same steps; `on`
computes about three times as much.

This ablation exists only at the scales pangea_7b and pangea_0_5b (configs/scales.py). The drawings of
the embedded sample are 64 pixels wide, and its evaluation shows each in one view.
"""

from ml_collections import ConfigDict

from configs import scales
from pangea_jax.model import PINPOINTS

AXIS = "any-resolution tiles"
DESIGNS = {
    "tiles": "With all else equal, does a picture in tiles score better than one view of it?"
}
SCALES = ("pangea_7b", "pangea_0_5b")


def points(arg: str | None = None) -> dict[str, float]:
    """Name -> number of canvases."""
    scales.parse(arg, DESIGNS, SCALES)
    return {"off": 0.0, "on": float(len(PINPOINTS))}


def get_config(arg: str | None = None) -> ConfigDict:
    args = scales.parse(arg, DESIGNS, SCALES)
    config = scales.base(args)
    tiled = scales.value(args, points(arg), 1.0) > 0
    config.model.pinpoints = PINPOINTS if tiled else ()
    config.title = "With tiles" if tiled else "One view a picture"
    return config
