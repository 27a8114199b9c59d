"""How many languages can the sample model learn, and with how many examples of each? The paper does
not vary this.

    for n in 8 16 38; do
        python launch/sweep.py --config=configs/ablate_num_languages.py:design=languages_$n \\
            --workdir=runs/languages_$n
    done
    python launch/sweep.py report runs/languages_8 runs/languages_16 runs/languages_38 --page=runs/languages.md

The question is what limits `:languages=all` of configs/sample.py. Each design is a number of
languages, each point a number of examples of every language, English included. The languages of a
design are also in the larger ones. The page of all designs has a figure with one curve for each,
over the languages that they share:

    the curves lie on each other    examples per language are what counts, and more would help
    more languages are lower        the model is too small for them, or they disturb each other

Steps are in proportion to examples, so more languages also mean more steps. The point of 5,000
examples and 38 languages takes as long as 4 default runs of the sample (48,000 conversations), and the
whole of the three sweeps as long as 11. They have not been run yet.

This ablation exists only at sample scale.
"""

from ml_collections import ConfigDict

from configs import scales
from configs.sample import LANGUAGES
from pangea_jax import languages

EXAMPLES = (1_250, 2_500, 5_000)
NUMBERS = (8, 16, 38)
AXIS = "examples per language"
DESIGNS = {
    f"languages_{n}": f"With {n} languages, how do the scores rise with the examples of each language? Compare the "
    "designs at the same number of examples per language."
    for n in NUMBERS
}
SCALES = ("sample",)
# The default languages, then the others by their number of samples in PangeaIns.
NESTED = (
    *LANGUAGES,
    *sorted(
        set(languages.EMOJI) - set(LANGUAGES),
        key=lambda code: (-languages.get(code).pangeains_thousands, code),
    ),
)


def points(arg: str | None = None) -> dict[str, float]:
    """Name -> examples per language."""
    _parse(arg)
    return {f"examples_{n}": float(n) for n in EXAMPLES}


def get_config(arg: str | None = None) -> ConfigDict:
    args = _parse(arg)
    examples = round(scales.value(args, points(arg), args["examples"]))
    codes = NESTED[: int(args["design"].removeprefix("languages_"))]
    config = scales.base(args | {"languages": "+".join(codes)})
    config.mixture.update(num_examples=examples * len(codes), en_ratio=None)
    config.title = f"{len(codes)} languages, {examples:,} examples of each"
    return config


def _parse(arg):
    args = scales.parse(arg, DESIGNS, SCALES, examples=2_500)
    for name, default in (("languages", "default"), ("num_examples", 0)):
        if args[name] != default:
            raise ValueError(f"remove the config argument {name}=: design= and examples= set it")
    return args
