"""The sample model on the embedded emoji dataset, the base of all experiments at sample scale.

    python launch/train.py --config=configs/sample.py

It is a small Pangea: a frozen, pre-trained ViT, a 2-layer MLP, one newline vector and a Qwen2-style
decoder. It learns to answer questions about drawings of animals, plants and food in 8 languages of 6
scripts, from conversations in Pangea's own format. `:languages=all` uses 38 languages with 6,000
conversations each on average, as in the default; this takes about five times as long. It starts from
parts that configs/sample_tower.py and configs/sample_stage1.py train.

One run of `:languages=all` (3,562 steps) ranks English 99 (artists seen in training) and 90 (unseen). With
as many conversations of each, the seven languages that stage 1 knows too rank 50 and 46, the other
thirty 21 and 19. So stage 1 limits it most, which has 8 languages.
"""

from ml_collections import ConfigDict

from configs.arguments import language_codes, parse_arg
from pangea_jax import languages
from pangea_jax.experiment import EvalConfig, Experiment
from pangea_jax.typed_config import section

LANGUAGES = ("en", "es", "sw", "ru", "ar", "hi", "zh", "ko")


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, en_ratio=0.4, languages="default", num_examples=0, seed=0)
    codes = language_codes(args["languages"], default=LANGUAGES, all=languages.EMOJI)
    config = section(Experiment, title="Sample model", seed=args["seed"])
    config.model.update(
        vision=dict(
            image_size=64,
            patch_size=16,
            width=160,
            layers=4,
            heads=5,
            mlp=640,
            feature_layer=-1,
            scan_unroll=4,
        ),
        language=dict(
            vocab_size=5200,
            width=128,
            layers=3,
            heads=4,
            kv_heads=2,
            head_width=32,
            mlp=256,
            rope_theta=10_000.0,
            tied_head=True,
            max_positions=512,
            final_norm_scale=4.0,
            scan_unroll=3,
        ),
        pinpoints=(),
        dtype="float32",
    )
    config.data.update(store="emoji", tokenizer="emoji", verify=True)
    config.pretrained = ("tower", "stage1")
    config.frozen = (r"vision\..*",)
    config.mixture.update(
        num_examples=args["num_examples"] or max(48_000, 6_000 * len(codes)),
        en_ratio=args["en_ratio"],
        languages=codes,
        sources=("emoji/noto", "emoji/fluent", "emoji/emojione", "emoji/openmoji"),
        text_ratio=0.06,
    )
    # 64 conversations a step. Rows are a little longer than four conversations on average. Names and
    # phrases of the 30 further languages have more tokens.
    default = set(codes) <= set(LANGUAGES)
    config.pipeline.update(
        rows=16,
        row_tokens=208 if default else 272,
        row_tiles=6,
        max_targets=88 if default else 96,
        packing="balanced",
        examples_per_row=4,
    )
    config.reading.background = (255, 255, 255)  # the drawings are transparent
    config.augmented_views = 12
    config.optimizer.update(learning_rate=3e-3, b2=0.98, weight_decay=0.01)
    config.keep = "all"
    config.eval = section(EvalConfig, limit=100, batch_size=64, max_new_tokens=32)
    return config
