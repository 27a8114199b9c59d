"""How much English? The paper's ablation of the English share (section 5, Figure 6).

    python launch/train.py --config=configs/ablate_en_ratio.py
    python launch/train.py --config=configs/ablate_en_ratio.py:en_ratio=0.8
    python launch/sweep.py --config=configs/ablate_en_ratio.py --workdir=runs/en_ratio --seeds=3
    python launch/sweep.py --config=configs/ablate_en_ratio.py:design=fixed_multilingual --workdir=runs/en_added

The total number of examples is fixed. English takes its share, and the other languages divide the
rest equally. The paper trains on 500K examples of its translated data, at 0, 20, 40, 60, 80 and 100
% English. It keeps 40 %, which gives its best multilingual score; this is the default point here.
In this design the others lose what English gains, so scores mostly follow each language's own
number of examples.

`design=fixed_multilingual` keeps the others' examples fixed, at their number for 40 % English, and
adds English (with the steps that this takes). Changes in the scores then come from transfer.

At sample scale, expect the others' names in the seen drawings to fall from 76 % right to 1 % between 0
and 100 % English, and English names to rise from 1 to 90 % (rank of ten: 97 to 30 %, and 51 to 99 %).
docs/ablations.md has the results. A sweep of six points takes 20 to 25 minutes on 2 CPU cores.
configs/scales.py explains the points of `:scale=pangea_0_5b` and `:scale=pangea_7b`, and their cost.
"""

from ml_collections import ConfigDict

from configs import scales

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
AXIS = "English among the examples (%)"
DESIGNS = {
    "fixed_total": "At a fixed total, how should examples be divided between English and the others? Scores follow "
    "each language's own number of examples. This design cannot separate transfer between languages from that effect.",
    "fixed_multilingual": "With the others' examples fixed, does added English help or hurt them? Changes in their "
    "scores come from transfer or interference, and from the longer training on more examples.",
}


def points(arg: str | None = None) -> dict[str, float]:
    """Name -> share of English in percent; of added English up to 60 %, 1.5 times the others."""
    design = _parse(arg)["design"]
    shares = SHARES if design == "fixed_total" else SHARES[:4]
    return {f"en_{round(100 * share):03d}": 100 * share for share in shares}


def get_config(arg: str | None = None) -> ConfigDict:
    args = _parse(arg)
    en_ratio = round(scales.value(args, points(arg), 100 * args["en_ratio"]) / 100, 6)
    config = scales.base(args)
    if args["design"] == "fixed_multilingual":
        config.mixture.num_examples = round(0.6 * config.mixture.num_examples)
    config.mixture.update(en_ratio=en_ratio, design=args["design"])
    if args["scale"] in scales.FULL:
        config.mixture.exclude_sources = scales.NATIVE
    config.title = f"{en_ratio:.0%} English"
    return config


def _parse(arg):
    return scales.parse(arg, DESIGNS, en_ratio=0.4)
