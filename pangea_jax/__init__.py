"""Pangea in JAX: a multilingual vision-language model for 39 languages.

import pangea_jax
model = pangea_jax.load("sample")                      # or a folder in one of the public layouts
message = {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "Hii ni nini?"}]}
model.generate([[message]])                            # -> list[str]
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pangea_jax.generate.engine import Engine, MeshChoice

__all__ = ["load"]


def load(
    name: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype=None,
    weights: str | None = None,
    mesh: "MeshChoice" = None,
    **kwargs,
) -> "Engine":
    """A model ready to answer.

    Args:
      name: "sample" for the model in the package; a folder with a checkpoint in one of the forms of
        `pangea_jax.checkpoints` and its tokenizer (tokenizer.json or tokenizer.model); or the name
        of a model on the Hugging Face hub. A folder may also hold adapters of peft, which are merged
        into the model below them.
      base: the model below adapters, in the same forms; by default the one that they name.
      dtype: of parameters and activations; by default bfloat16, for the sample float32.
      weights: "int8", "int4" or "nf4": the language model in 8 or 4 bits, rounded as it is read
        (docs/evaluation.md, "Weights in 8 and 4 bits"); by default as the checkpoint has it.
      mesh: devices that hold the model: a mesh, `{"tensor": 4}`, or "auto" for all devices of this
        process, see `pangea_jax.generate.engine.choose_mesh`. None: one device.
      kwargs: fields of `pangea_jax.data.reader.ReadingPolicy` that replace those saved with the
        model, such as `orientation="upright"`.

    Raises:
      CheckpointError, ValueError: the folder is incomplete, or does not fit the model.
      FileNotFoundError: there is no such model.
    """
    # Imported here, because `import pangea_jax.languages` must not load JAX.
    from pangea_jax.assets import SAMPLE_MODEL
    from pangea_jax.checkpoints import resolve
    from pangea_jax.generate.engine import load_folder

    folder = SAMPLE_MODEL if name == "sample" and not base else resolve(name, base)
    return load_folder(folder, dtype=dtype, weights=weights, mesh=mesh, **kwargs)
