"""A prompt as the model reads it, and what two of them have in common."""

import dataclasses
import functools
import hashlib

import numpy as np

from pangea_jax.batch import Example


@dataclasses.dataclass(frozen=True)
class Prompt(Example):
    """A conversation to answer."""

    @functools.cached_property
    def digest(self) -> bytes:
        """Of the tiles, for comparing them with those of many others."""
        return hashlib.sha256(np.ascontiguousarray(self.tiles)).digest()

    @property
    def pictures_end(self) -> int:
        """Tokens up to the last one of a picture; 0 of text alone."""
        pictures = np.flatnonzero(self.image_index >= 0)
        return int(pictures[-1]) + 1 if len(pictures) else 0

    def rest(self, start: int) -> "Prompt":
        """The text from token `start` on."""
        return Prompt(self.tokens[start:], self.image_index[start:], self.tiles[:0])

    def shared(self, other: "Prompt") -> int:
        """How many first tokens both have, pictures and all."""
        length = min(len(self.tokens), len(other.tokens))
        differs = self.tokens[:length] != other.tokens[:length]
        differs |= self.image_index[:length] != other.image_index[:length]
        same = int(differs.argmax()) if differs.any() else length
        pictures = np.flatnonzero(self.image_index[:same] >= 0)
        if len(pictures) and self.digest != other.digest:
            return int(pictures[0])
        return same
