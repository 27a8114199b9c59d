"""Stage 1 of a small Pangea: the projector learns to read the vision tower for Qwen2-0.5B-Instruct.

    python launch/train.py --config=configs/pangea_0_5b_pretrain.py --workdir=runs/pangea_0_5b_pretrain

It is configs/pangea_7b_pretrain.py with another decoder: 558,128 English captions, each read once, 4,360
steps of 128, and only the projector trains. Expect a model that writes captions. Four rows of four
captions are computed at a time; `--config.accumulation=32` takes one.
"""

from ml_collections import ConfigDict

from configs import pangea_7b_pretrain
from configs.arguments import parse_arg, under
from configs.pangea_0_5b_finetune import CHIPS, QWEN2_0_5B

DECODER = "checkpoints/Qwen2-0.5B-Instruct"


def get_config(arg: str | None = None) -> ConfigDict:
    root = parse_arg(arg, num_examples=558_128, seed=0, root="")["root"]
    config = pangea_7b_pretrain.get_config(arg)
    config.title = "Pangea on Qwen2-0.5B, stage 1"
    config.model.language.update(QWEN2_0_5B)
    tower = under(root, pangea_7b_pretrain.TOWER)
    config.pretrained = (f"{tower}:vision", f"{under(root, DECODER)}:language")
    config.accumulation = config.pipeline.rows // CHIPS
    return config
