"""Shows what training will see: decoded rows with the trained tokens in colour, and their tiles.

    python launch/inspect_data.py --config=configs/sample.py --n=8
    python launch/inspect_data.py --config=configs/sample.py --skip=100 --workdir=runs/look

Prints the mixture and the first `n` rows; writes batch.html with the same and batch.png with the tiles into the
work directory. Pictures are shown as tiles also where training takes cached features of augmented views.
"""

import dataclasses
import itertools
import json
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

from absl import flags, logging
from rich.console import Console

from launch import common
from pangea_jax import experiment
from pangea_jax.data import batch_view

CONFIG = common.define_config("configs/ablate_en_ratio.py")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where batch.html and batch.png go; default runs/<config and argument>."
)
ROWS = flags.DEFINE_integer("n", 8, "Rows to show.", lower_bound=1)
SKIP = flags.DEFINE_integer("skip", 0, "Batches to go past first.", lower_bound=0)


def main(argv):
    common.no_arguments(argv)
    exp = CONFIG()
    exp = dataclasses.replace(exp, pipeline=dataclasses.replace(exp.pipeline, workers=0))
    store, tokenizer = experiment.open_data(exp)
    choice = experiment.choose_records(exp, store)
    logging.info("mixture: %s", json.dumps(choice.summary()))
    reader = experiment.make_reader(exp, store, tokenizer)
    feed, patches = experiment.make_feed(exp, store, choice, reader), reader.pictures.patches
    there = feed.num_batches
    data = iter(feed)
    is_there = there is None or SKIP.value < there  # else all of them would be read first
    batch = next(itertools.islice(data, SKIP.value, None), None) if is_there else None
    if batch is None:
        raise common.UserError(
            f"there is no batch after --skip={SKIP.value}: the examples chosen make "
            f"{'fewer' if there is None else there} of {exp.pipeline.rows} rows; lower --skip or "
            "config.pipeline.rows, or raise config.mixture.num_examples"
        )
    workdir = Path(WORKDIR.value or common.default_workdir())
    console = Console()
    batch_view.print_batch(batch, tokenizer, patches, console, rows=ROWS.value)
    batch_view.save_batch(batch, tokenizer, patches, workdir, rows=ROWS.value, name="batch")
    steps = "an unknown number of" if feed.num_batches is None else feed.num_batches
    print(f"{steps} steps; the tiles are in {workdir / 'batch.png'}")
    data.close()


if __name__ == "__main__":
    common.run(main)
