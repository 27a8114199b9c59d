"""What an ablation varies: the sample model, or Pangea-7B. The arguments that all ablations share.

    scale       sample (minutes on a laptop) or pangea_7b
    point       one of the config's `points()`, as `launch/sweep.py` asks for them
    design      which question is asked, one of the config's `DESIGNS`
    languages   default, all, or codes joined by `+`
    num_examples  0: as many as the scale has
    seed        of the examples drawn, their order and what is initialised

At 7B scale a point is 500K examples, as in section 5 of the paper: 3,906 steps of 128. By the paper's own rate, 10.2
examples a second on 8 H100, that is 14 hours. Two conversations always fit a row of 8,192 tokens, so that every
step has exactly 128 and points differ in nothing but what is varied.
"""

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import pangea_7b_finetune, sample
from configs.common import choice, parse_arg
from pangea_jax import languages

SCALES = ("sample", "pangea_7b")
# The paper spreads its translated data over 17 languages and lists none; these are the 17 largest of its Table 5.
LARGEST = tuple(
    sorted(languages.PANGEAINS, key=lambda code: -languages.get(code).pangeains_thousands)[:18]
)
# Not translated from the English pool: what was written, or made anew, in its own language (section 2.2 and 2.3).
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
    """The shared arguments and an ablation's `own`; `designs` begin with the default one.

    Raises:
      ValueError: an argument is not known, not one of those there are, or one of `own` beside the point that sets it.
    """
    args = parse_arg(
        arg,
        scale=scales[0],
        point="",
        design=next(iter(designs)),
        languages="default",
        num_examples=0,
        seed=0,
        **own,
    )
    choice("scale", args["scale"], scales)
    choice("design", args["design"], tuple(designs))
    for key in own:
        if args["point"] and re.search(rf"\b{key}=", arg):
            raise ValueError(f"config argument {key}= beside point={args['point']}, which sets it")
    return args


def value(args: Mapping[str, Any], points: Mapping[str, Any], default: Any) -> Any:
    """What `point=` stands for, `default` without one."""
    return points[choice("point", args["point"], tuple(points))] if args["point"] else default


def base(args: Mapping[str, Any]) -> ConfigDict:
    """The config that a point changes; 40 % English, the others evenly."""
    if args["scale"] == "sample":
        number = f",num_examples={args['num_examples']}" if args["num_examples"] else ""
        return sample.get_config(f"languages={args['languages']},seed={args['seed']}{number}")
    config = pangea_7b_finetune.get_config(f"seed={args['seed']}")
    config.mixture = dict(
        num_examples=args["num_examples"] or 500_000,
        en_ratio=0.4,
        languages=_languages(args["languages"]),
        text_ratio=None,
        exclude_categories=("ocr",),
    )
    config.pipeline.update(rows=64, row_tiles=10, packing="balanced", examples_per_row=2)
    return config


def steps(config: ConfigDict) -> int:
    """Steps of one pass over the examples, which "balanced" rows fix beforehand."""
    return config.mixture.num_examples // (config.pipeline.rows * config.pipeline.examples_per_row)


def samples(config: ConfigDict) -> dict[str, float]:
    """Language -> thousands of samples in PangeaIns (Table 5), in the config's order."""
    found = map(languages.get, config.mixture.languages)
    return {language.code: language.pangeains_thousands for language in found}


def _languages(text: str) -> tuple[str, ...]:
    named = {"default": LARGEST, "all": languages.PANGEAINS}
    return named.get(text) or tuple(text.split("+"))
