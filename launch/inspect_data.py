"""Shows the data of a training run: decoded rows with the trained tokens in colour, and their tiles.

    python launch/inspect_data.py --config=configs/sample.py --n=8
    python launch/inspect_data.py --config=configs/sample.py --skip=100 --workdir=runs/look

It prints the mixture and the first `n` rows of a batch. The work directory gets the rows as batch.html and the tiles
as batch.png. If training uses cached features of augmented views, the pictures are shown as tiles, too.
"""

import dataclasses
import itertools
import json

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

from absl import flags, logging

from launch import common
from pangea_jax import experiment
from pangea_jax.data import batch_view
from pangea_jax.figures import inert
from pangea_jax.work import mirror

CONFIG = common.define_config("configs/ablate_en_ratio.py")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for batch.html and batch.png; default runs/<config and argument>."
)
ROWS = flags.DEFINE_integer("n", 8, "Rows to show.", lower_bound=1)
SKIP = flags.DEFINE_integer("skip", 0, "Batches to leave out first.", lower_bound=0)


def main(argv):
    common.no_arguments(argv)
    exp = CONFIG()
    exp = dataclasses.replace(exp, pipeline=dataclasses.replace(exp.pipeline, workers=0))
    store, tokenizer = experiment.open_data(exp)
    choice = experiment.choose_records(exp, store)
    logging.info("mixture: %s", json.dumps(choice.summary()))
    reader = experiment.make_reader(exp, store, tokenizer)
    feed, patches = experiment.make_feed(exp, store, choice, reader), reader.pictures.patches
    known = feed.num_batches
    data = iter(feed)
    beyond = known is not None and SKIP.value >= known  # known without reading all batches
    batch = None if beyond else next(itertools.islice(data, SKIP.value, None), None)
    if batch is None:
        raise common.UserError(
            f"there is no batch after --skip={SKIP.value}: the chosen examples make "
            f"{'fewer' if known is None else known} batches of {exp.pipeline.rows} rows; lower --skip or "
            "config.pipeline.rows, or raise config.mixture.num_examples"
        )
    workdir = common.folder(WORKDIR.value or common.default_workdir(), "--workdir")
    console = inert.console()
    batch_view.print_batch(batch, tokenizer, patches, console, rows=ROWS.value)
    with mirror.mirrored(workdir) as files:
        batch_view.save_batch(
            batch, tokenizer, patches, files.folder, rows=ROWS.value, name="batch"
        )
    steps = "an unknown number of" if known is None else known
    print(f"{steps} steps; the tiles are in {workdir / 'batch.png'}")
    data.close()


if __name__ == "__main__":
    common.run(main)
