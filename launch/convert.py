"""Converts a checkpoint from a public layout (safetensors) to this project's form (Orbax), or back.

    python launch/convert.py --from=neulab/Pangea-7B-hf --to=checkpoints/pangea-7b
    python launch/convert.py --from=checkpoints/pangea-7b --to=Pangea-7B-hf --format=hf --dtype=bfloat16
    python launch/convert.py --from=runs/finetune --to=My-Pangea-hf --format=hf
    python launch/convert.py --from=neulab/Pangea-7B-hf --to=checkpoints/pangea-7b-int8 --weights=int8
    python launch/convert.py --from=runs/lora --to=My-adapters --format=peft
    python launch/convert.py --from=My-adapters --to=My-Pangea-hf --format=hf      # merged into their base

`--from` is a folder in any layout, the work directory of a training run (its newest step), or a name on the Hugging
Face hub. The result holds weights, config, tokenizer, processor and `reading.json`, which says how the model reads a
conversation. `pangea_jax.load` reads both forms; transformers and vLLM read `--format=hf`. The conversion never holds
the whole model in memory. If it is stopped, only `<to>.partial` is left; repeat the command. `--format=peft` writes
only the adapters of a run, for the peft library. `--from` may also hold such adapters, ours or peft's. `--base` names
the model below the adapters, if it is not the one that the run or the adapters name.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

import jax
import numpy as np
from absl import flags, logging
from rich import progress

from launch import common
from pangea_jax import checkpoints
from pangea_jax.checkpoints import adapter, convert
from pangea_jax.figures import inert
from pangea_jax.model import quantized
from pangea_jax.work import paths

DTYPES = ("float32", "bfloat16", "float16")

FROM = flags.DEFINE_string(
    "from", None, "A folder, the work directory of a run, or owner/name on the hub."
)
TO = flags.DEFINE_string("to", None, "The folder to write, new or empty.")
FORMAT = flags.DEFINE_enum("format", "orbax", (*convert.FORMATS, "peft"), "What to write.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "Type of the parameters; the default is the type in the source."
)
LAYOUT = flags.DEFINE_enum(
    "layout",
    "transformers-4",
    convert.LAYOUTS,
    "Names of tensors for --format=hf. transformers-4 is the layout of neulab/Pangea-7B-hf, which transformers 4 and 5 "
    "and vLLM read. transformers-5 is the layout that transformers 5 writes; vLLM does not read it.",
)
WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    quantized.FORMS,
    "Round the language model to 8 or 4 bits; the default is the form in the source. Only pangea_jax reads the result.",
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "A folder or file with the tokenizer, if neither --from nor the config of the run has one.",
)
BASE = flags.DEFINE_string(
    "base",
    "",
    "Folder or hub name of the model below adapters, instead of the one that --from names: read with it, or with "
    "--format=peft written into their config.",
)


def main(argv):
    if len(argv) > 1 or not FROM.value or not TO.value:
        raise common.UserError(
            "expected --from=DIR|owner/name and --to=DIR, and no arguments that are not flags"
        )
    # The conversion runs on the host, so that it takes no accelerator from another job.
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)
    if FROM.value == "sample" and not Path("sample").exists():
        raise common.UserError(
            "the sample model is part of the package, not a folder; launch/train.py writes a model like it to "
            "model/ in its work directory, in the form of --format=hf"
        )
    if LAYOUT.present and FORMAT.value != "hf":
        raise common.UserError(f"--layout is only for --format=hf, not for --format={FORMAT.value}")
    if FORMAT.value == "peft" and (DTYPE.value or TOKENIZER.value or WEIGHTS.value):
        raise common.UserError("--format=peft takes neither --dtype nor --weights nor --tokenizer")
    target = common.folder(TO.value, "--to")
    try:
        is_peft = FORMAT.value == "peft"
        source = checkpoints.resolve(FROM.value, None if is_peft else BASE.value)
        if is_peft:
            adapter.convert(source, target, base=BASE.value)
        else:
            convert_model(source, target)
    except KeyboardInterrupt:
        print(
            f"stopped; {target}.partial is incomplete, so repeat the command",
            file=sys.stderr,
        )
        sys.exit(common.EXIT_INTERRUPTED)
    print(f"{target}: {FORMAT.value}, {sum(paths.sizes(target).values()) / 1e9:.2f} GB")


def convert_model(source: Path, target: Path) -> None:
    """Converts the whole model and shows a progress bar."""
    files = paths.expand(paths.path(TOKENIZER.value or checkpoints.tokenizer_files(source)))
    tokenizer = checkpoints.load_tokenizer(source, files)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = inert.console(stderr=True)
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{Path(source).name} to {FORMAT.value}", total=None)
        notes = convert.convert(
            source,
            target,
            tokenizer,
            tokenizer_files=files,
            form=FORMAT.value,
            dtype=np.dtype(DTYPE.value) if DTYPE.value else None,
            layout=LAYOUT.value,
            form_of_weights=WEIGHTS.value,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for note in notes:
        console.print(f"note: {note}")


if __name__ == "__main__":
    common.run(main)
