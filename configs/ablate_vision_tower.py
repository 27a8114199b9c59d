"""Should the vision tower train? The paper trains it at a tenth of the learning rate and does not
vary this.

    python launch/sweep.py --config=configs/ablate_vision_tower.py --workdir=runs/vision_tower --seeds=3

`tuned` trains the tower at a tenth of the learning rate, as the paper does (2e-6, not 2e-5, Table
1). `frozen` does not train it. At sample scale both see the original drawings. The augmented views
of the other configs are stored features of a frozen tower, and would be a second difference.

No published result exists to compare with. Each of the two points takes longer than a point with
stored features, because the tower runs at every step. `tuned` also runs its backward pass. For
the other scales see configs/scales.py.
"""

from ml_collections import ConfigDict

from configs import scales

AXIS = "vision tower"
DESIGNS = {"tower": "With all else equal, does training the vision tower change the scores?"}


def points(arg: str | None = None) -> dict[str, float]:
    """Name -> factor on the tower's learning rate."""
    scales.parse(arg, DESIGNS)
    return {"frozen": 0.0, "tuned": 0.1}


def get_config(arg: str | None = None) -> ConfigDict:
    args = scales.parse(arg, DESIGNS)
    factor = scales.value(args, points(arg), 0.1)
    config = scales.base(args)
    config.augmented_views = 0
    config.frozen = () if factor else (r"vision\..*",)
    config.optimizer.lr_scale = ((r"vision\..*", factor),) if factor else ()
    config.title = "Tower tuned" if factor else "Tower frozen"
    return config
