"""Pangea in JAX: a multilingual multimodal LLM for 39 languages.

import pangea_jax
model = pangea_jax.load("sample")                      # or a folder in one of the public layouts
message = {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "Hii ni nini?"}]}
model.generate([[message]])                            # -> list[str]
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pangea_jax.generate.engine import Engine

__all__ = ["load"]


def load(path: str) -> "Engine":
    """A model ready to answer.

    Args:
      path: "sample" for the model in the package, or a folder with a checkpoint in one of the
        layouts of `pangea_jax.checkpoints` and its tokenizer (tokenizer.json or tokenizer.model).

    Raises:
      CheckpointError, ValueError: the folder lacks something, or holds what the model has not.
    """
    # Imported here, so that `import pangea_jax.languages` needs neither JAX nor a device.
    from pangea_jax.generate.engine import load_folder, load_sample

    return load_sample() if path == "sample" else load_folder(path)
