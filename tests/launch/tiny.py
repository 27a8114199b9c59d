"""A run that takes seconds, for tests that start many. All parameters train, from random values, with pictures."""

from ml_collections import ConfigDict

from configs import sample
from configs.arguments import parse_arg

ROWS = 8


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, steps=12)
    config = sample.get_config(f"num_examples={2 * ROWS * args['steps']}")
    config.title = "Tiny"
    config.model.vision.update(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp=32)
    config.model.language.update(
        width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp=32, final_norm_scale=1.0
    )
    config.data.verify = False
    config.pretrained, config.frozen, config.augmented_views = (), (), 0
    config.pipeline.update(rows=ROWS, row_tokens=224, max_targets=128, examples_per_row=2)
    config.optimizer.eps = 1e-3  # Adam divides rounding errors by the root of tiny gradients
    config.log_every = 2
    config.checkpoint.every = 5
    config.eval = None
    return config
