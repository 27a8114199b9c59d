"""Filters pairs of picture and alt text by the paper's rules (section 2.2), and computes CLIP scores."""

import dataclasses
import functools
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float32
from PIL import Image

from pangea_jax import languages
from pangea_jax.curation.image_text import Pair
from pangea_jax.data import image


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """What a pair must be. The defaults are the paper's (section 2.2).

    Attributes:
      min_side, max_side: limits of both sides of the picture, in pixels.
      min_aspect, max_aspect: limits of width / height.
      min_chars, max_chars: limits of the characters of the alt text.
      nsfw: NSFW tags that may pass. (): every pair passes, also without a tag.
      min_similarity: a pair passes above this CLIP score. None: every pair passes, also without a score.
    """

    min_side: int = 224
    max_side: int = 4096
    min_aspect: float = 0.25
    max_aspect: float = 3.0
    min_chars: int = 5
    max_chars: int = 5000
    nsfw: tuple[str, ...] = ("UNLIKELY",)
    min_similarity: float | None = 0.3


@dataclasses.dataclass(frozen=True)
class Filters(FilterConfig):
    """The rules, with languages and words.

    Attributes:
      languages: canonical codes that may pass; the language of a pair without a tag is identified later.
      blocked: words and phrases in lower case that an alt text must not contain.
    """

    languages: tuple[str, ...] | None = None
    blocked: frozenset[str] = frozenset()

    def reason(self, pair: Pair) -> str | None:
        """Why a pair does not pass; None if it does. Only the header of the picture is read."""
        if not self.min_chars <= len(pair.text) <= self.max_chars:
            return f"text is too {'short' if len(pair.text) < self.min_chars else 'long'}"
        if self.nsfw and pair.nsfw.upper() not in self.nsfw:
            return "NSFW tag" if pair.nsfw else "no NSFW tag"
        wanted = self.languages is None or not pair.language
        if not wanted and language_code(pair.language) not in self.languages:
            return "language is not wanted"
        if self.is_blocked(pair.text):
            return "offensive text"
        if pair.encoded is not None:
            return self.reason_of_size(pair.encoded)
        return self._of_size(pair.width, pair.height)

    def reason_of_size(self, encoded: bytes) -> str | None:
        """Why a picture does not pass, from its header."""
        try:
            return self._of_size(*image.header_size(encoded))
        except image.ImageError as error:
            return error.fault

    def _of_size(self, width: int | None, height: int | None) -> str | None:
        if not width or not height:
            return "size is not known"
        if min(width, height) < self.min_side:
            return "picture is too small"
        if max(width, height) > self.max_side:
            return "picture is too large"
        if not self.min_aspect <= width / height <= self.max_aspect:
            return "aspect ratio"
        return None

    def is_blocked(self, text: str) -> bool:
        if not self.blocked:
            return False
        found = words(text)
        if not self._blocked_words.isdisjoint(found):
            return True
        line = f" {' '.join(found)} "
        return any(f" {phrase} " in line for phrase in self._blocked_phrases)

    @functools.cached_property
    def _blocked_words(self) -> frozenset[str]:
        split = (words(entry) for entry in self.blocked)
        return frozenset(some[0] for some in split if len(some) == 1)

    @functools.cached_property
    def _blocked_phrases(self) -> tuple[str, ...]:
        split = (words(entry) for entry in self.blocked)
        return tuple(sorted(" ".join(some) for some in split if len(some) > 1))


def language_code(tag: str) -> str | None:
    """The canonical code of a tag; None if pangea_jax.languages does not have it."""
    try:
        return languages.get(tag).code
    except KeyError:
        return None


# Han, kana, Thai, Lao, Burmese and Khmer have no spaces between words, so each character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation. In scripts without spaces, each character is a word.

    >>> words("Ｔokyo's Skytree, 東京!")
    ['tokyo', 's', 'skytree', '東', '京']
    """
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_separators())
    return _WORD.findall(plain)


@functools.cache
def _separators() -> dict[int, str]:
    """Maps every character that is not a letter, mark or number to a space."""
    characters = (c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    return {c: " " for c in characters if unicodedata.category(chr(c))[0] not in "LMN"}


class Scorer(Protocol):
    """Scores how well texts describe pictures: the cosine similarity of each pair, in order."""

    def __call__(
        self, pictures: Sequence[Image.Image], texts: Sequence[str]
    ) -> Float32[np.ndarray, " B"]: ...


class ClipScorer:
    """A two-tower model of transformers (CLIP, SigLIP, ...). It needs torch.

    Args:
      name: name on the Hub, or folder. Alt texts in many languages need a multilingual model.
    """

    def __init__(self, name: str):
        try:
            import torch
            import transformers
        except ImportError:
            raise ImportError(
                f"scoring with {name} needs torch and transformers; run: "
                "pip install -r requirements-parity.txt"
            ) from None
        self._torch = torch
        self._model = transformers.AutoModel.from_pretrained(name).eval()
        self._processor = transformers.AutoProcessor.from_pretrained(name)

    def __call__(self, pictures, texts):
        inputs = self._processor(
            images=list(pictures),
            text=list(texts),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
        )
        with self._torch.inference_mode():
            out = self._model(**inputs)
        cosine = self._torch.nn.functional.cosine_similarity
        return cosine(out.image_embeds, out.text_embeds).float().numpy()
