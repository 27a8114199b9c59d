"""The sample model on the embedded emoji dataset, the base of all experiments at sample scale.

    python launch/train.py --config=configs/sample.py

It is a small Pangea: a frozen, pre-trained ViT, a 2-layer MLP, one newline vector and a Qwen2-style
decoder. It learns to name images of animals, plants and food in 8 languages of 6 scripts, from
instruction records in Pangea's own format. `:languages=all` uses 38 languages with as many examples
each, which takes about five times as long. It starts from parts that configs/sample_tower.py and
configs/sample_stage1.py train.
"""

from ml_collections import ConfigDict

from configs.arguments import language_codes, parse_arg
from pangea_jax import languages
from pangea_jax.experiment import Experiment
from pangea_jax.sample.naming import Evaluation
from pangea_jax.typed_config import section

LANGUAGES = ("en", "es", "sw", "ru", "ar", "hi", "zh", "ko")


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, en_ratio=0.4, languages="default", num_examples=0, seed=0)
    codes = language_codes(args["languages"], default=LANGUAGES, all=languages.EMOJI)
    config = section(Experiment, title="Sample model", seed=args["seed"])
    config.model.update(
        vision=dict(
            image_size=48,
            patch_size=8,
            width=128,
            layers=4,
            heads=4,
            mlp=512,
            feature_layer=-1,
            scan_unroll=4,
        ),
        language=dict(
            vocab_size=4500,
            width=128,
            layers=3,
            heads=4,
            kv_heads=2,
            head_width=64,
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
        # The model learns names by repetition. For 38 languages even 2,000 examples per language are few: the mean rank
        # accuracy on seen drawings is 16 % with 37 languages besides English (chance is 11 %), and 47 % with 7.
        num_examples=args["num_examples"] or max(16_000, 2_000 * len(codes)),
        en_ratio=args["en_ratio"],
        languages=codes,
        sources=("emoji/noto", "emoji/fluent", "emoji/emojione", "emoji/openmoji"),
        text_ratio=0.1,
    )
    config.pipeline.update(
        rows=8, row_tokens=144, row_tiles=3, max_targets=40, packing="balanced", examples_per_row=2
    )
    config.reading.background = (255, 255, 255)  # the drawings are transparent
    config.augmented_views = 12
    config.optimizer.update(learning_rate=1e-3, b2=0.98, weight_decay=0.01)
    config.keep = "all"
    config.eval = section(Evaluation, limit=100, batch_size=64, prompt_tokens=56, max_new_tokens=32)
    return config
