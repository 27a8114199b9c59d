"""Where do the examples of the other languages come from: translated, native or cultural data? The
paper does not vary this.

    python launch/sweep.py --config=configs/ablate_data_origin.py --workdir=runs/data_origin --submit=tpu --dry_run

English is left out, because it has none of these origins. Each point has 500K examples of 17 other
languages, in equal numbers, from one of these origins:

    all               all records, in their natural mix
    translated        records translated from the English pool (section 2.1)
    native            records written or made in the language: the cultural dataset and existing
                      datasets (2.2, 2.3)
    cultural          the cultural dataset (2.2)
    without_cultural  all but the cultural dataset; the comparison with `all` shows its effect

This ablation exists only at the scales pangea_7b and pangea_0_5b (configs/scales.py), because all
records of the embedded sample have the same origin. If an origin has no record of a language, training
does not start, with an error; `:languages=` selects other languages.
"""

from ml_collections import ConfigDict

from configs import scales

AXIS = "origin of the other languages' examples"
DESIGNS = {
    "origin": "With a fixed number of examples, does their origin change the scores of the other languages?"
}
SCALES = ("pangea_7b", "pangea_0_5b")
SOURCES = {
    "all": {},
    "translated": {"exclude_sources": scales.NATIVE},
    "native": {"sources": scales.NATIVE},
    "cultural": {"sources": scales.CULTURAL},
    "without_cultural": {"exclude_sources": scales.CULTURAL},
}


def points(arg: str | None = None) -> dict[str, float]:
    """Name -> its place in `SOURCES`."""
    scales.parse(arg, DESIGNS, SCALES)
    return {name: float(place) for place, name in enumerate(SOURCES)}


def get_config(arg: str | None = None) -> ConfigDict:
    args = scales.parse(arg, DESIGNS, SCALES)
    config = scales.base(args)
    origin = tuple(SOURCES)[int(scales.value(args, points(arg), 0.0))]
    config.mixture.update(en_ratio=0.0, **SOURCES[origin])
    config.title = f"Origin: {origin.replace('_', ' ')}"
    return config
