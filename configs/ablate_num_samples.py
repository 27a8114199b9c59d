"""How many multimodal samples? The paper's ablation of the dataset size (section 5, Figure 5).

    python launch/sweep.py --config=configs/ablate_num_samples.py --workdir=runs/num_samples --seeds=3
    python launch/sweep.py --config=configs/ablate_num_samples.py:design=one_run --seeds=3 \\
        --workdir=runs/num_samples_one_run
    python launch/train.py --config=configs/ablate_num_samples.py:fraction=0.5

The points are 10, 30, 50, 70, 90 and 100 % of the examples. The paper's axis ends at 5.5M of 6.15M,
and its script saves every 5 % of the steps. So its points are probably checkpoints of one run, at
which the learning rate is still high.

`design=separate` trains one model to the end for every size; for one seed, a smaller set is a
subset of a larger one. `design=one_run` follows the paper: the first 10, 30, ... % of the steps of
one long run, with that run's schedule. This equals the long run's checkpoint at that step. Both
designs use each example once, so fewer samples also mean fewer steps.

Expect scores that rise slowly at first, and still rise at the end; docs/ablations.md has the results
at sample scale. A sweep costs as much as 3.5 full runs, 10 to 15 minutes on 2 CPU cores. For
`:scale=pangea_7b`, 100 % is the natural mixture of all 6.15M examples. The paper's run on them took
1,344 hours of an H100; the sweep takes 3.5 times as long.
"""

from ml_collections import ConfigDict

from configs import scales

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
PANGEAINS_EXAMPLES = 6_150_624  # 6,450,624 in the release, minus 300,000 of OCR
AXIS = "examples trained on (% of all)"
DESIGNS = {
    "separate": "How good is a model that is trained to the end on a part of the data? "
    "Fewer examples also mean fewer steps.",
    "one_run": "How good is one long run after a part of its steps? Early points have a learning rate that is still "
    "high, so they say more about the run than about the data.",
}


def points(arg: str | None = None) -> dict[str, float]:
    """Name -> percent of the examples."""
    _parse(arg)
    return {f"samples_{round(100 * f):03d}": 100 * f for f in FRACTIONS}


def get_config(arg: str | None = None) -> ConfigDict:
    args = _parse(arg)
    if args["scale"] in scales.FULL:
        args["num_examples"] = args["num_examples"] or PANGEAINS_EXAMPLES
        args["languages"] = "all" if args["languages"] == "default" else args["languages"]
    fraction = scales.value(args, points(arg), 100 * args["fraction"]) / 100
    config = scales.base(args)
    if args["scale"] in scales.FULL:
        config.mixture.update(en_ratio=None, language_alpha=1.0)
    if args["design"] == "separate":
        config.mixture.num_examples = round(fraction * config.mixture.num_examples)
    else:
        config.optimizer.schedule_steps = scales.steps(config)
        config.steps = round(fraction * config.optimizer.schedule_steps)
    config.title = f"{fraction:.0%} of the examples"
    return config


def _parse(arg):
    return scales.parse(arg, DESIGNS, fraction=1.0)
