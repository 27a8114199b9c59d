"""How does a language's share of the examples relate to its score? (section 5, Figure 7)

    python launch/sweep.py --config=configs/ablate_language_popularity.py --workdir=runs/popularity --seeds=3
    python launch/sweep.py --config=configs/ablate_language_popularity.py:design=rotate --workdir=runs/rotated

The paper trains nothing for this. It plots its final model's scores, relative to English, against
the languages' shares of PangeaIns. Here the share varies. `design=alpha` gives each language,
English included, a share in proportion to n ** alpha, where n is its number of samples (Table 5).
Alpha 1 is the natural mix (English has 20 times as many as Spanish), 0 is uniform. The natural
point gives the paper's own plot.

In `design=alpha`, the effects of share and language cannot be separated. `design=rotate` moves the
shares: at rotation k, language i gets the share of language i + k. So each of 8 languages gets each
share once. The shares are Zipf's, 1/r for the r-th largest language, because the natural shares are
too close together, except those of English and Chinese. Expect higher scores with more examples;
docs/ablations.md has the results. A point takes as long as one of configs/ablate_en_ratio.py.
"""

from ml_collections import ConfigDict

from configs import scales

ALPHAS, ROTATIONS = (0.0, 0.5, 1.0), 8
AXIS = {"alpha": "alpha: 0 uniform, 1 natural", "rotate": "places by which the shares are moved"}
DESIGNS = {
    "alpha": "Does it help to show all languages equally often? At each point a language has one share, so the "
    "effects of share and language cannot be separated. The same is true of the paper's own plot of share "
    "against relative score.",
    "rotate": "Does every language score better the more often it is seen? Every language is trained at "
    "several shares, so its own difficulty cancels out.",
}


def points(arg: str | None = None) -> dict[str, float]:
    """Name -> alpha, or the places by which the shares are moved."""
    args = _parse(arg)
    if args["design"] == "alpha":
        return {f"alpha_{round(100 * alpha):03d}": alpha for alpha in ALPHAS}
    count = len(scales.base(args).mixture.languages)
    places = sorted({i * count // ROTATIONS for i in range(ROTATIONS)})
    return {f"rotate_{place:02d}": float(place) for place in places}


def get_config(arg: str | None = None) -> ConfigDict:
    args = _parse(arg)
    config = scales.base(args)
    config.mixture.en_ratio = None
    if args["scale"] in scales.FULL:
        config.eval.bench.tasks = scales.POPULARITY_TASKS
    samples = scales.samples(config)
    if args["design"] == "alpha":
        alpha = scales.value(args, points(arg), args["alpha"])
        config.mixture.weights = {code: n**alpha for code, n in samples.items()}
        config.title = f"Languages in proportion to n^{alpha:g}"
    else:
        ranked = sorted(samples, key=lambda code: -samples[code])
        config.mixture.weights = {code: 1 / rank for rank, code in enumerate(ranked, start=1)}
        config.mixture.rotate = int(scales.value(args, points(arg), 0.0))
        config.title = f"Languages by Zipf's shares, moved by {config.mixture.rotate}"
    return config


def _parse(arg):
    return scales.parse(arg, DESIGNS, alpha=1.0)
