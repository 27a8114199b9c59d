"""Copies the weights of the sample model from finished runs into the package, as float16.

    python launch/pretrain_tower.py --workdir=runs/sample_tower
    python launch/ship_sample.py tower runs/sample_tower
    python launch/pretrain_sample.py --workdir=runs/sample_stage1
    python launch/ship_sample.py stage1 runs/sample_stage1
    python launch/train.py --config=configs/ablate_en_ratio.py --workdir=runs/en_ratio
    python launch/ship_sample.py model runs/en_ratio

Float16 costs no accuracy at this size; the tests score the shipped model.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

import numpy as np

from pangea_jax.assets import EMOJI, SAMPLE_MODEL
from pangea_jax.checkpoints import SpecialTokens, config_from_folder, load, load_policy, save
from pangea_jax.data.tokenizer import load_tokenizer


def ship_model(run: Path) -> None:
    """Copies the config and all weights but the tower from a run of `launch/train.py`."""
    config = config_from_folder(run / "model")
    tokenizer = load_tokenizer(EMOJI)
    tokens = SpecialTokens.of(tokenizer)
    only = ("projector", "newline", "language")
    with tempfile.TemporaryDirectory() as folder:
        state = load(run / "model", config, only=only)
        save(state, config, folder, dtype=np.dtype("float16"), tokens=tokens, only=only)
        for file in ("model.safetensors", "config.json"):
            shutil.copyfile(Path(folder) / file, SAMPLE_MODEL / file)
    load_policy(run / "model").save(SAMPLE_MODEL)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("tower", "stage1", "model"))
    parser.add_argument("run", type=Path, help="work directory of the finished run")
    args = parser.parse_args()
    SAMPLE_MODEL.mkdir(parents=True, exist_ok=True)
    if args.part == "model":
        ship_model(args.run)
    else:
        weights = args.run / args.part / "model.safetensors"
        shutil.copyfile(weights, SAMPLE_MODEL / f"{args.part}.safetensors")
    for file in sorted(SAMPLE_MODEL.iterdir()):
        print(f"{file.stat().st_size:>9} bytes  {file.name}")


if __name__ == "__main__":
    main()
