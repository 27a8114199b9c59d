"""Fine-tunes a model of your own choice on your own data.

    python launch/train.py --config=configs/finetune.py:model=Pangea-7B-hf,data=data/mine,lora=16 --workdir=runs/mine
    python launch/train.py --config=configs/finetune.py:model=sample,data=data/mine --workdir=runs/mine

    model       a folder in any form that `pangea_jax.load` reads, a name on the Hugging Face hub, or "sample"
    data        a store that launch/build_data.py has made
    lora        rank of adapters on all kernels of the decoder; 0: everything trains
    weights     int8, int4 or nf4: the frozen language model under the adapters in 8 or 4 bits (QLoRA)
    epochs      passes over the data
    batch       records in a step
    validation  share of the records that is held back; the loss on it is in metrics.jsonl and loss.png
    dtype       of activations and frozen weights: bfloat16 (default; float32 for the sample) or float32
    seed        of the order of the records, the held-back part, and the adapters

All sizes come from the model's config.json, tokenizer and way of reading from its folder. Each record
has a row of up to 4,096 tokens; what is longer is cut. If the model is large, the rows are computed
one after the other, which fits one GPU (on several, set `--config.accumulation` to a divisor of the
rows of each). `--config.pipeline.packing=planned` fills rows with several short records. A model
without AnyRes takes up to 8 pictures a record; `--config.pipeline.row_tiles` sets more.

Only the words of the answers are trained. Adapters learn at 2e-4; a whole model at 2e-5, its tower at
a tenth of that. Expect the losses on the held-back part before and after training on the console,
`model/` with the whole model, and `adapter/`, which peft and `pangea_jax.load` read. With `weights` there is only
`adapter/`: adapters are merged into the weights before the rounding (`launch/convert.py --format=hf`).
"""

import dataclasses

from ml_collections import ConfigDict

from configs.arguments import choice, parse_arg
from pangea_jax import assets, checkpoints
from pangea_jax.checkpoints import rounded
from pangea_jax.checkpoints.adapter import SAMPLE
from pangea_jax.experiment import EvalConfig, Experiment
from pangea_jax.model import LoraConfig, PangeaConfig
from pangea_jax.typed_config import section

LONGEST_ROW = 4096
# From this width on, a row is computed alone, and its activations are computed twice.
LARGE = 2048
# In a record, for a model that sees a picture as one tile: every row has as many places, used or not.
MOST_PICTURES = 8


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(
        arg,
        model="sample",
        data="",
        lora=0,
        epochs=3,
        batch=16,
        validation=0.1,
        dtype="",
        seed=0,
        weights="",
    )
    if not args["data"]:
        raise ValueError(
            "the config argument data= is missing: a folder made by launch/build_data.py"
        )
    if args["dtype"]:
        choice("dtype", args["dtype"], ("bfloat16", "float32"))
    for key, least in (("lora", 0), ("epochs", 1), ("batch", 1)):
        if args[key] < least:
            raise ValueError(f"config argument {key}={args[key]}: expected {least} or more")
    name = args["model"]
    try:
        folder = assets.SAMPLE_MODEL if name == "sample" else checkpoints.resolve(name)
        found = checkpoints.config_from_folder(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config argument model={name}: {error}") from error
    tokenizer = checkpoints.load_tokenizer(folder)
    if found.language.lora.rank:
        raise ValueError(
            f"the config argument model={name} is a run that trains adapters; give its folder model/ or "
            "adapter/, which it writes at its end, or start from it with --init_from"
        )
    found = rounded.choose_form(found, args["weights"], folder)
    if found.language.weights and not args["lora"]:
        raise ValueError(
            f"weights in {found.language.weights} do not train; add adapters with the config argument lora=16"
        )
    model = dataclasses.replace(
        found,
        dtype=args["dtype"] or ("float32" if name == "sample" else found.dtype),
        language=dataclasses.replace(
            found.language, lora=LoraConfig(rank=args["lora"], alpha=2.0 * (args["lora"] or 8))
        ),
    )
    config = section(Experiment, title=f"{name.rstrip('/').split('/')[-1]}, fine-tuned")
    config.seed = args["seed"]
    config.model = section(PangeaConfig, **dataclasses.asdict(model))
    config.data.update(
        store=args["data"],
        tokenizer=str(checkpoints.tokenizer_files(folder)),
        image_id=tokenizer.image_id,
    )
    config.pretrained = SAMPLE if name == "sample" else (name,)
    config.reading.update(dataclasses.asdict(checkpoints.load_policy(folder)))
    config.mixture.update(
        num_examples=None, epochs=args["epochs"], language_alpha=1.0, text_ratio=None
    )
    config.validation.fraction = args["validation"]
    row_tokens = min(LONGEST_ROW, found.language.max_positions)
    config.pipeline.update(
        rows=args["batch"],
        row_tokens=row_tokens,
        row_tiles=_most_tiles(model, row_tokens),
        packing="none",
        loss_mask="answer",
        overlong="truncate",
        max_bad_fraction=0.001,
        threads=4,
    )
    large = found.language.width >= LARGE
    config.accumulation = config.pipeline.rows if large else 1
    config.keep = "products" if large else "all"
    config.optimizer.update(learning_rate=2e-5, lr_scale=((r"vision\..*", 0.1),))
    if args["lora"]:
        config.frozen = _frozen(found)
        config.checkpoint.base = name
        config.optimizer.update(learning_rate=2e-4, lr_scale=())
    config.log_every = 1
    config.eval = section(EvalConfig, bench={})  # for --config.eval.bench.tasks
    return config


def _most_tiles(model: PangeaConfig, row_tokens: int) -> int:
    """The tiles that a row of one record has places for. Without AnyRes a picture is one tile."""
    most = row_tokens // model.vision.patches + 2
    return most if model.pinpoints else min(most, MOST_PICTURES)


def _frozen(model: PangeaConfig) -> tuple[str, ...]:
    """Patterns of all parameters except the adapters."""
    newline = (r"newline_d",) if model.newline else ()
    return (r"(vision|projector)\..*", *newline, r"language\.(?!.*_lora\.).*")
