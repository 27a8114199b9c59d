"""Converts a checkpoint: public layouts (safetensors) to our own form (Orbax), and back.

    python launch/convert.py --from=neulab/Pangea-7B-hf --to=checkpoints/pangea-7b
    python launch/convert.py --from=checkpoints/pangea-7b --to=Pangea-7B-hf --format=hf --dtype=bfloat16
    python launch/convert.py --from=runs/finetune --to=My-Pangea-hf --format=hf
    python launch/convert.py --from=runs/lora --to=My-adapters --format=peft --base=neulab/Pangea-7B-hf

`--from` is a folder in any layout, the work directory of a training run (its newest step), or a name on the
Hugging Face hub. The result holds weights, config, tokenizer, processor and how the
model reads a conversation (`reading.json`); `pangea_jax.load` takes either form,
transformers and vLLM take `--format=hf`. The whole model is never in memory. A conversion that is cut off leaves only
`<to>.partial`; repeat the command. `--format=peft` writes only a run's adapters, for the peft library; `--base` names
the model that the run started from.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

import jax
import numpy as np
from absl import flags, logging
from rich import progress
from rich.console import Console

from launch import common
from pangea_jax import checkpoints
from pangea_jax.checkpoints import adapter, convert

DTYPES = ("float32", "bfloat16", "float16")

FROM = flags.DEFINE_string(
    "from", None, "A folder, a run's work directory, or owner/name on the hub."
)
TO = flags.DEFINE_string("to", None, "The folder to write, new or empty.")
FORMAT = flags.DEFINE_enum("format", "orbax", (*convert.FORMATS, "peft"), "What to write.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "Type of the parameters; by default that of the source."
)
LAYOUT = flags.DEFINE_enum(
    "layout",
    "transformers-4",
    convert.LAYOUTS,
    "Names of tensors for --format=hf: those of neulab/Pangea-7B-hf, which transformers 4 and 5 and vLLM "
    "read, or those that transformers 5 writes and vLLM does not read.",
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "A folder or file with the tokenizer, if neither --from nor the run's config has it.",
)
BASE = flags.DEFINE_string(
    "base",
    "",
    "For --format=peft: folder or hub name of the model that the run started from, written as given; by default none.",
)


def main(argv):
    if len(argv) > 1 or not FROM.value or not TO.value:
        raise common.UserError("expected --from=DIR|owner/name and --to=DIR, and nothing but flags")
    # Conversion runs on the host: it must not take an accelerator from another job.
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)
    if FROM.value == "sample" and not Path("sample").exists():
        raise common.UserError(
            "the sample model is part of the package, not a folder; launch/train.py writes a model like it to "
            "model/ in its work directory, as --format=hf does"
        )
    if LAYOUT.present and FORMAT.value != "hf":
        raise common.UserError(f"--layout is only for --format=hf, not for {FORMAT.value}")
    if BASE.value and FORMAT.value != "peft":
        raise common.UserError(
            "--base is only for --format=peft: it names the model under the adapters"
        )
    if FORMAT.value == "peft" and (DTYPE.value or TOKENIZER.value):
        raise common.UserError("--format=peft takes neither --dtype nor --tokenizer")
    target = Path(TO.value).expanduser()
    try:
        source = checkpoints.resolve(FROM.value)
        if FORMAT.value == "peft":
            adapter.convert(source, target, base=BASE.value)
        else:
            convert_model(source, target)
    except KeyboardInterrupt:
        print(
            f"stopped; to convert, repeat the command ({target}.partial is incomplete)",
            file=sys.stderr,
        )
        sys.exit(common.EXIT_INTERRUPTED)
    print(
        f"{target}: {FORMAT.value}, {sum(f.stat().st_size for f in target.rglob('*')) / 1e9:.2f} GB"
    )


def convert_model(source: Path, target: Path) -> None:
    """Writes the whole model, with a progress bar."""
    files = Path(TOKENIZER.value or checkpoints.tokenizer_files(source)).expanduser()
    tokenizer = checkpoints.load_tokenizer(source, files)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{source.name} to {FORMAT.value}", total=None)
        notes = convert.convert(
            source,
            target,
            tokenizer,
            tokenizer_files=files,
            form=FORMAT.value,
            dtype=np.dtype(DTYPE.value) if DTYPE.value else None,
            layout=LAYOUT.value,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for note in notes:
        console.print(f"note: {note}")


if __name__ == "__main__":
    common.run(main)
