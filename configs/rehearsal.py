"""A rehearsal: 50 steps with the 7B's data pipeline, losses and checkpoints, and a tiny model.

    python launch/build_data.py pangeains --source=PangeaInstruct --out=data/pangeains --limit=2000 \\
        --tokenizer=checkpoints/Pangea-7B-hf
    python launch/inspect_data.py --config=configs/rehearsal.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python launch/train.py --config=configs/rehearsal.py

Before you pay for hardware, it shows on any machine what configs/pangea_7b_finetune.py will do with
your records. The template, loss mask, tiles of 336 pixels, rows of 8,192 tokens and mixture are the
same. The vision tower has two narrow layers and the decoder one; both start from random values.
`:store=DIR,tokenizer=DIR` names a dataset elsewhere; add `image_id=151646` for a plain Qwen2
tokenizer. Expect the loss to fall from 12 (the log of the vocabulary size) to 8 or 9, in twenty
minutes on two CPU cores (five with `--config.pipeline.rows=2`, see docs/data.md). The model itself
is useless.
"""

from ml_collections import ConfigDict

from configs import pangea_7b_finetune
from configs.arguments import parse_arg, under


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(
        arg,
        store="data/pangeains",
        tokenizer="checkpoints/Pangea-7B-hf",
        image_id=0,
        steps=50,
        seed=0,
        root="",
    )
    store, tokenizer = (under(args["root"], args[name]) for name in ("store", "tokenizer"))
    config = pangea_7b_finetune.get_config(f"seed={args['seed']}")
    config.title = "Rehearsal"
    config.data.update(store=store, tokenizer=tokenizer)
    if args["image_id"]:
        config.data.image_id = args["image_id"]
    config.model.vision.update(width=32, layers=2, heads=4, mlp=64)
    # One layer is enough: most of the time goes to attention in long rows and to the head over Qwen2's vocabulary.
    config.model.language.update(width=16, layers=1, heads=4, kv_heads=4, head_width=8, mlp=64)
    config.model.dtype = "float32"
    config.pretrained = ()
    # The longest answers of the released sample have 1,495 tokens. The head computes at most 1,536 tokens per row.
    config.pipeline.update(rows=8, max_targets=1536, threads=2)
    config.keep = "all"
    # If the steps need more records than there are, records are repeated.
    config.mixture.update(num_examples=64 * args["steps"], max_repeat=1e9)
    config.optimizer.learning_rate = 1e-2
    config.steps = args["steps"]
    config.log_every = 5
    config.checkpoint.every = 25
    return config
