"""Reads and writes checkpoints of models: the public Hugging Face layouts and our own form."""

from pangea_jax.checkpoints.adapted import AdapterFolder
from pangea_jax.checkpoints.config import SpecialTokens
from pangea_jax.checkpoints.files import CheckpointError
from pangea_jax.checkpoints.folder import (
    config_from_folder,
    load,
    load_model,
    load_policy,
    load_tokenizer,
    peek,
    resolve,
    tokenizer_files,
)
from pangea_jax.checkpoints.huggingface import save

__all__ = [
    "AdapterFolder",
    "CheckpointError",
    "SpecialTokens",
    "config_from_folder",
    "load",
    "load_model",
    "load_policy",
    "load_tokenizer",
    "peek",
    "resolve",
    "save",
    "tokenizer_files",
]
