"""A prompt as the model reads it, and the prefix that two prompts share."""

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
        """A hash of the tiles, to compare them with those of many other prompts."""
        return hashlib.sha256(np.ascontiguousarray(self.tiles)).digest()

    @property
    def pictures_end(self) -> int:
        """Number of tokens up to the last one of a picture; 0 without pictures."""
        pictures = np.flatnonzero(self.image_index >= 0)
        return int(pictures[-1]) + 1 if len(pictures) else 0

    def rest(self, start: int) -> "Prompt":
        """The text from token `start` on."""
        return Prompt(self.tokens[start:], self.image_index[start:], self.tiles[:0])

    def shared(self, other: "Prompt") -> int:
        """Length of the common prefix in tokens; equal tokens of different pictures do not count."""
        length = min(len(self.tokens), len(other.tokens))
        differs = self.tokens[:length] != other.tokens[:length]
        differs |= self.image_index[:length] != other.image_index[:length]
        same = int(differs.argmax()) if differs.any() else length
        pictures = np.flatnonzero(self.image_index[:same] >= 0)
        if len(pictures) and self.digest != other.digest:
            return int(pictures[0])
        return same
