"""Stage 2 of a small Pangea: the same recipe on Qwen2-0.5B-Instruct, meant for one card or four chips.

    python launch/train.py --config=configs/pangea_0_5b_finetune.py --workdir=runs/pangea_0_5b
    python launch/train.py --config=configs/pangea_0_5b_finetune.py:num_examples=50000 --workdir=runs/small

Everything but the decoder is as in configs/pangea_7b_finetune.py: vision tower, projector, tiles, data,
rows, optimiser. The decoder has 494 million parameters, and its head is its embedding. The paper has no
model of this size, so there is nothing to compare with. It is for the ablations (`:scale=pangea_0_5b`,
configs/scales.py): it learns from the same data in the same way, at a tenth of the cost. Nobody has
trained it yet, and its memory is not measured.

Each of four chips computes a row at a time (`accumulation`). On one card take
`--config.accumulation=32`, on n chips 32 / n. configs/scales.py has the time and the cost of a point.
"""

from ml_collections import ConfigDict

from configs import pangea_7b_finetune
from configs.arguments import parse_arg, under

# https://huggingface.co/Qwen/Qwen2-0.5B-Instruct/blob/main/config.json
QWEN2_0_5B = dict(
    vocab_size=151936,
    width=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head_width=64,
    mlp=4864,
    tied_head=True,
)
CHIPS = 4


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, batch=128, num_examples=0, seed=0, root="")
    config = pangea_7b_finetune.get_config(arg)
    config.title = "Pangea on Qwen2-0.5B"
    config.model.language.update(QWEN2_0_5B)
    first = under(args["root"], "runs/pangea_0_5b_pretrain/model")
    config.pretrained = (f"{first}:vision+projector+language",)
    config.accumulation = config.pipeline.rows // CHIPS
    return config
