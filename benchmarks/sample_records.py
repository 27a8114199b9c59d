"""Counts the tokens of the embedded sample's conversations, to choose the size of rows, and the tokens of names.

python -m benchmarks.sample_records
python -m benchmarks.sample_records --letter=0.5 --two_pictures=0     # any number of the plan
"""

import argparse
import dataclasses

import numpy as np

from configs import sample
from pangea_jax import experiment, languages
from pangea_jax.data import pipeline
from pangea_jax.sample import emoji
from pangea_jax.sample.conversations import Plan
from pangea_jax.typed_config import build

KINDS = ("text", "one picture", "two pictures")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=4000, help="conversations to measure")
    for field in dataclasses.fields(Plan):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return parser.parse_args(argv)


def conversations(exp: experiment.Experiment) -> None:
    """Prints how long the chosen conversations are, and how much of them is trained on."""
    store, tokenizer = experiment.open_data(exp)
    choice = experiment.choose_records(exp, store)
    reader = experiment.make_reader(exp, store, tokenizer)
    roomy = dataclasses.replace(exp.pipeline, row_tokens=4096, row_tiles=8, max_targets=None)
    sizes = pipeline.measure(pipeline.RowSource(store, choice.rows), reader, roomy)
    print(f"{'':14}{'records':>8}{'tokens':>8}{'longest':>9}{'trained':>9}{'most':>6}{'share':>8}")
    for name, rows in [
        *((kind, sizes[sizes[:, 1] == tiles]) for tiles, kind in enumerate(KINDS)),
        ("all", sizes),
    ]:
        if len(rows):
            (tokens, _, trained), (longest, _, most) = rows.mean(0), rows.max(0)
            print(
                f"{name:14}{len(rows):8}{tokens:8.1f}{longest:9}{trained:9.1f}{most:6}"
                f"{trained / tokens:8.1%}"
            )


def names(exp: experiment.Experiment) -> None:
    """Prints the mean number of tokens of a name."""
    _, tokenizer = experiment.open_data(exp)
    lengths = {
        code: np.mean([len(tokenizer.encode(c.names[code])) for c in emoji.load_concepts()])
        for code in languages.EMOJI
    }
    for title, codes in (("default", sample.LANGUAGES), ("all", languages.EMOJI)):
        mean = np.mean([lengths[code] for code in codes])
        each = ", ".join(f"{code} {lengths[code]:.1f}" for code in codes)
        print(f"tokens a name, {title} languages: {mean:.2f} ({each})")


def main() -> None:
    arguments = vars(parse_arguments())
    config = sample.get_config()
    config.mixture.num_examples = arguments.pop("examples")
    config.data.plan.update(arguments)
    exp = build(experiment.Experiment, config)
    conversations(exp)
    names(exp)


if __name__ == "__main__":
    main()
