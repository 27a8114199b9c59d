"""Stage 1 of Pangea-7B: the projector learns to read the vision tower (section 4.1, Table 1).

    python launch/build_data.py pangeains --source=LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \\
        --images=LLaVA-Pretrain --out=data/llava_pretrain --tokenizer=checkpoints/Pangea-7B-hf
    python launch/train.py --config=configs/pangea_7b_pretrain.py --workdir=runs/pangea_7b_pretrain

The dataset is 558,128 English captions of LLaVA-Pretrain, each read once: 4,360 steps of 128. Only
the projector trains, from random values, at 1e-3. The tower is CLIP's; the decoder is
Qwen2-7B-Instruct. Table 1 also prints a learning rate for tower and decoder in this stage, but
the released script trains only `mm_mlp_adapter`; this config follows the script.

Expect a model that writes captions; no score of this stage is published. The paper used 32 hours of
an H100, 4 h on 8 of them.

Each image is one view. LLaVA-NeXT crops the centre of the image and has no newline vector yet. Here
the whole image is resized, like the base view of stage 2. The newline vector follows it and stays
at its random start.
"""

from ml_collections import ConfigDict

from configs import pangea_7b_finetune
from configs.arguments import parse_arg, under
from pangea_jax.data.pipeline import PipelineConfig
from pangea_jax.typed_config import section

TOWER = "checkpoints/clip-vit-large-patch14-336"
DECODER = "checkpoints/Qwen2-7B-Instruct"


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, num_examples=558_128, seed=0, root="")
    root = args["root"]
    config = pangea_7b_finetune.get_config(arg)
    config.title = "Pangea-7B, stage 1"
    config.data.store = under(root, "data/llava_pretrain")
    config.model.pinpoints = ()
    config.pretrained = (f"{under(root, TOWER)}:vision", f"{under(root, DECODER)}:language")
    config.frozen = (r"vision\..*", r"language\..*", "newline_d")
    config.mixture.num_examples = args["num_examples"]
    # 32 rows of four captions are the batch of 128. Their images take 4 * 577 tokens of a row.
    config.pipeline = section(
        PipelineConfig,
        rows=32,
        row_tokens=4096,
        row_tiles=4,
        max_targets=None,
        packing="balanced",
        examples_per_row=4,
        loss_mask="pangea",
        overlong="truncate",
        max_bad_fraction=0.001,
        threads=16,
    )
    config.reading.multi_image = "anyres"
    config.optimizer.update(learning_rate=1e-3, lr_scale=())
    return config
