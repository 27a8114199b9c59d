"""How often each language is seen against how well it does (section 5, Figure 7).

    python launch/sweep.py --config=configs/ablate_language_popularity.py --workdir=runs/popularity --seeds=3
    python launch/sweep.py --config=configs/ablate_language_popularity.py:design=rotate --workdir=runs/rotated

The paper trains nothing for this: it sets its final model's scores, relative to English, against the languages' shares
of PangeaIns. Here the share varies. `design=alpha`: in proportion to n ** alpha of a language's n samples (Table 5),
English included; 1 is natural (English 20 times Spanish), 0 uniform. The natural point gives the paper's own plot.

There share cannot be told from language. `design=rotate` deals shares out anew: at rotation k language i gets that of
language i + k; of 8 languages each gets each share once. They are Zipf's, 1/r for the r-th largest language: the
natural ones of all but English and Chinese lie too close together. Expect more examples to give higher scores;
docs/ablations.md has what came out. A point takes as long as one of configs/ablate_en_ratio.py.
"""

from ml_collections import ConfigDict

from configs import scales

ALPHAS, ROTATIONS = (0.0, 0.5, 1.0), 8
AXIS = {"alpha": "alpha: 0 uniform, 1 natural", "rotate": "places by which the shares are moved"}
DESIGNS = {
    "alpha": "Does evening out how often languages are seen help them? Each language has one share a point, so "
    "that share and language are confounded, as they are in the paper's own plot of share against relative score.",
    "rotate": "Does a language do better the more often it is seen, whichever it is? Every language is trained at "
    "several shares, so that its own difficulty cancels.",
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
