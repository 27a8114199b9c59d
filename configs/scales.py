"""What all ablations share: the base config (the sample model or Pangea-7B) and these arguments.

    scale         sample (minutes on a laptop), pangea_0_5b (one card or four chips) or pangea_7b
    point         one of the config's `points()`; `launch/sweep.py` sets it
    design        the question to answer, one of the config's `DESIGNS`
    languages     default, all, or codes joined by `+`
    num_examples  0: the default number of the scale
    seed          of the examples drawn, their order and the initial values
    root          folder or gs:// address of data/, checkpoints/ and runs/, not at sample scale

At full scale a point is 500K examples, as in section 5 of the paper: 3,906 steps of 128. Two
conversations always fit a row of 8,192 tokens. So every step has exactly 128 examples, and only the
varied setting differs between points. At its end, a point asks itself the data sets of PangeaBench
whose curves the paper prints (`config.eval.bench`, documents in data/pangeabench), which is about a
twentieth of its FLOPs.

    scale         FLOPs of a point   time of a point
    pangea_7b     1.0e20             14 hours on 8 H100, at the paper's own speed of 10.2 examples/s
    pangea_0_5b   1.1e19             10 hours on v5litepod-4 (46 dollars at 1.20 a chip-hour), 8 on an
                                     H100, both at 40 % MFU; 3 days on an L4 of 24 GB at 35 %

Times at 0.5B scale are computed from the FLOPs, not measured. `num_examples=50000` is a tenth of that.
Its first stage (configs/pangea_0_5b_pretrain.py) is trained once and costs 1.6e18 FLOPs: 1.4 hours on
v5litepod-4. On one card take `--config.accumulation=64`, which computes a row at a time.
"""

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import pangea_0_5b_finetune, pangea_7b_finetune, sample
from configs.arguments import choice, language_codes, parse_arg, under
from pangea_jax import languages
from pangea_jax.data.mixture import Mixture
from pangea_jax.experiment import EvalConfig
from pangea_jax.typed_config import section

# The multimodal data sets whose curves the paper prints (Figure 5), and those of its Figure 7.
PAPER_TASKS = "m3exam,xgqa,xmmmu,maxm"
POPULARITY_TASKS = "cvqa,xgqa,xmmmu,marvl"
FULL = {"pangea_0_5b": pangea_0_5b_finetune, "pangea_7b": pangea_7b_finetune}
SCALES = ("sample", *FULL)
# English and the 17 largest other languages of the paper's Table 5. The paper's translated data has 17 languages, but
# the paper does not list them.
LARGEST = tuple(
    sorted(languages.PANGEAINS, key=lambda code: -languages.get(code).pangeains_thousands)[:18]
)
# Sources that were written or made in their own language, not translated from English (sections 2.2 and 2.3).
CULTURAL = ("cultural*",)
NATIVE = (
    *CULTURAL,
    "*/Viet-*",
    "*/STAIR-Captions",
    "*/LLaVA-JP*",
    "*/[gG][qQ][aA]-ru",
    "*/[mM][tT][vV][qQ][aA]",
    "*/doc-vqa",
    "*/table-vqa",
    "*/llava-med-zh*",
)


def parse(
    arg: str | None, designs: Mapping[str, str], scales: tuple[str, ...] = SCALES, **own: Any
) -> dict[str, Any]:
    """Reads the shared arguments and the `own` ones of an ablation. The first of `designs` is the default.

    Raises:
      ValueError: an argument or its value is unknown, or `arg` sets `point=` and an `own` argument.
    """
    args = parse_arg(
        arg,
        scale=scales[0],
        point="",
        design=next(iter(designs)),
        languages="default",
        num_examples=0,
        seed=0,
        root="",
        **own,
    )
    choice("scale", args["scale"], scales)
    if args["root"] and args["scale"] == "sample":
        raise ValueError("remove the config argument root=: the sample is in the package")
    choice("design", args["design"], tuple(designs))
    for key in own:
        if args["point"] and re.search(rf"\b{key}=", arg):
            raise ValueError(f"remove the config argument {key}=: point={args['point']} sets it")
    return args


def value(args: Mapping[str, Any], points: Mapping[str, Any], default: Any) -> Any:
    """The value that `point=` names, or `default` without `point=`."""
    return points[choice("point", args["point"], tuple(points))] if args["point"] else default


def base(args: Mapping[str, Any]) -> ConfigDict:
    """The config that a point changes. It has 40 % English and equal shares of the other languages."""
    if args["scale"] == "sample":
        number = f",num_examples={args['num_examples']}" if args["num_examples"] else ""
        return sample.get_config(f"languages={args['languages']},seed={args['seed']}{number}")
    config = FULL[args["scale"]].get_config(f"seed={args['seed']},root={args['root']}")
    config.mixture = section(
        Mixture,
        num_examples=args["num_examples"] or 500_000,
        en_ratio=0.4,
        languages=language_codes(args["languages"], default=LARGEST, all=languages.PANGEAINS),
        text_ratio=None,
        exclude_categories=("ocr",),
    )
    config.pipeline.update(rows=64, row_tiles=10, packing="balanced", examples_per_row=2)
    # A row at a time on each of so many chips; None: as many chips as rows.
    if chips := getattr(FULL[args["scale"]], "CHIPS", None):
        config.accumulation = config.pipeline.rows // chips
    config.eval = bench(args["root"])
    return config


def bench(root: str, tasks: str = PAPER_TASKS) -> ConfigDict:
    """`config.eval` of a point at full scale: PangeaBench at the end, and a small part of it 4 times on the way."""
    data = under(root, "data/pangeabench")
    return section(EvalConfig, bench=dict(tasks=tasks, data=data, every=1000, profile="paper"))


def steps(config: ConfigDict) -> int:
    """Number of steps in one pass over the examples, with "balanced" rows."""
    return config.mixture.num_examples // (config.pipeline.rows * config.pipeline.examples_per_row)


def samples(config: ConfigDict) -> dict[str, float]:
    """Language -> thousands of samples in PangeaIns (Table 5), in the config's order."""
    found = map(languages.get, config.mixture.languages)
    return {language.code: language.pangeains_thousands for language in found}
