"""Where do the other languages' examples come from? Translated, native, cultural; never varied in the paper.

    python launch/sweep.py --config=configs/ablate_data_origin.py --workdir=runs/data_origin --submit=tpu --dry_run

No English, which is of none of these origins, and 500K examples of 17 other languages, evenly, drawn from

    all               everything there is, as it comes
    translated        what was translated from the English pool (section 2.1)
    native            what was written or made in the language: the cultural set and the existing ones (2.2, 2.3)
    cultural          the cultural set (2.2)
    without_cultural  all but the cultural set: beside `all`, what that set is worth

At 7B scale alone (configs/scales.py): the embedded sample is of one origin. A language that an origin lacks is an
error before anything trains; `:languages=` names others.
"""

from ml_collections import ConfigDict

from configs import scales

AXIS = "origin of the other languages' examples"
DESIGNS = {
    "origin": "At a fixed number of examples, does their origin matter to the other languages' scores?"
}
SCALES = ("pangea_7b",)
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
