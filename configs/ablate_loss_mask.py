"""Which tokens should be trained? Pangea's loss mask against the usual one.

    python launch/sweep.py --config=configs/ablate_loss_mask.py --workdir=runs/loss_mask --seeds=3

`answer` trains on the assistant's words and the end token. `pangea` is the mask of the released
`preprocess_qwen`: the whole assistant message with its header, and every newline, <|im_start|> and
<|im_end|> anywhere, also in the user's turns. The paper does not mention it.

No published result exists to compare with. At sample scale there is no visible difference
(docs/ablations.md). The two points take a few minutes on 2 CPU cores; for the other scales see
configs/scales.py.
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
        # The wider mask trains about twelve more tokens of every turn.
        config.pipeline.max_targets = config.pipeline.row_tokens
    config.title = f'Loss mask "{mask}"'
    return config
