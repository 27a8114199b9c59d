"""Public checkpoints: read and write the Hugging Face layouts of LLaVA-NeXT."""

from pangea_jax.checkpoints.config import SpecialTokens, config_from_folder
from pangea_jax.checkpoints.files import CheckpointError
from pangea_jax.checkpoints.huggingface import load, load_model, save

__all__ = [
    "CheckpointError",
    "SpecialTokens",
    "config_from_folder",
    "load",
    "load_model",
    "save",
]
