"""Which tokens to learn from? The mask that Pangea was trained with against the one that is usually meant.

    python launch/sweep.py --config=configs/ablate_loss_mask.py --workdir=runs/loss_mask --seeds=3

`answer` trains on the assistant's words and the end token. `pangea` is what the released `preprocess_qwen` leaves: the
whole assistant message with its header, and every newline, <|im_start|> and <|im_end|> anywhere, those of the
user's turns included. The paper does not speak of it.

Nothing is published to compare with. At sample scale no difference is shown (docs/ablations.md). Two points of a few
minutes on 2 CPU cores; at `:scale=pangea_7b`, see configs/scales.py.
"""

from ml_collections import ConfigDict

from configs import scales

AXIS = "loss mask"
DESIGNS = {"mask": "With all else equal, do the extra trained tokens of the released code matter?"}
MASKS = ("answer", "pangea")


def points(arg: str | None = None) -> dict[str, float]:
    """Name -> its place in `MASKS`."""
    scales.parse(arg, DESIGNS)
    return {mask: float(place) for place, mask in enumerate(MASKS)}


def get_config(arg: str | None = None) -> ConfigDict:
    args = scales.parse(arg, DESIGNS)
    config = scales.base(args)
    mask = MASKS[int(scales.value(args, points(arg), 0.0))]
    config.pipeline.loss_mask = mask
    if args["scale"] == "sample":
        # Of a conversation with one short answer the wider mask trains some ten tokens more.
        config.pipeline.max_targets = 80
    config.title = f'Loss mask "{mask}"'
    return config
