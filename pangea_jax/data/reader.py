"""Turns a conversation and its pictures into the input of the model.

Training, answering, evaluation and inspection all use this reader, so the input is the same
everywhere. The settings are a `ReadingPolicy`, which is saved with the model.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from PIL import Image

from pangea_jax import anyres
from pangea_jax.data import chat, image
from pangea_jax.data.record import Conversation, Turn
from pangea_jax.data.store import RecordStore
from pangea_jax.data.tokenizer import Tokenizer

POLICY_FILE = "reading.json"
MULTI_IMAGE = ("anyres", "padded")
TEMPLATES = ("qwen_1_5",)
# LLaVA-NeXT pads with CLIP's mean colour, `int(255 * mean)`.
PADDING_COLOUR = (122, 116, 104)

# Number of tiles of a picture, and its `image_index` counted from its own first tile.
Place = tuple[int, Int[np.ndarray, " T"]]


@dataclasses.dataclass(frozen=True)
class ReadingPolicy:
    """How a model reads a conversation. The defaults are those of the reference at inference.

    Attributes:
      background: colour (R, G, B) behind transparent parts of a picture. None drops the alpha
        channel, as the reference does, and so shows the colour of transparent pixels.
      rounding: how the picture geometry rounds, see `pangea_jax.anyres.layout`.
      multi_image: how a conversation with several pictures shows each of them. "padded": one view,
        padded to a square, as in Pangea's training. "anyres": tiles, as for a single picture and as
        in Pangea's evaluation.
      marker_first: put the only `<image>` of a message before its words, as in Pangea's training.
      orientation: "stored" keeps the pixels as they are in the file, as the reference does.
        "upright" rotates them as the EXIF tag says. The pictures of a store that was built to be
        seen upright are rotated with both.
      template: the chat template, one of `TEMPLATES`.

    Raises:
      ValueError: a value is not allowed.
    """

    background: tuple[int, int, int] | None = None
    rounding: str = "llava"
    multi_image: str = "anyres"
    marker_first: bool = False
    orientation: str = "stored"
    template: str = TEMPLATES[0]

    def __post_init__(self):
        for name, known in (
            ("rounding", tuple(anyres.ROUNDINGS)),
            ("multi_image", MULTI_IMAGE),
            ("orientation", image.ORIENTATIONS),
            ("template", TEMPLATES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"reading.{name} {getattr(self, name)!r} is not one of {known}")
        if self.background is not None:
            colour = tuple(self.background)
            if len(colour) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in colour):
                raise ValueError(
                    f"reading.background is {colour}; expected (red, green, blue), each 0 to 255, or None"
                )
            object.__setattr__(self, "background", colour)

    def save(self, folder: Path) -> None:
        """Writes `POLICY_FILE` into the folder of a model."""
        content = json.dumps(dataclasses.asdict(self), indent=2)
        (folder / POLICY_FILE).write_text(content + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, content: Any, where: str) -> "ReadingPolicy":
        """Reads the policy from a JSON object.

        Args:
          where: the name of the object in errors.

        Raises:
          ValueError: it is not an object, or has an unknown field or value.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{where}: expected an object, found {content!r:.60}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(content) - set(known)):
            raise ValueError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(known)}")
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


REFERENCE = ReadingPolicy()


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The part of the picture geometry that the model's architecture fixes.

    Attributes:
      pinpoints: canvases as (width, height), see `pangea_jax.anyres.layout`; empty: a single view.
      tile_size: side of a tile in pixels.
      grid: number of patches on a side of a tile.
      newline: whether the model has the newline vector.
    """

    pinpoints: tuple[anyres.Size, ...]
    tile_size: int
    grid: int
    newline: bool = True

    @classmethod
    def of(cls, model: Any) -> "Geometry":
        """The geometry of a `pangea_jax.model.PangeaConfig`."""
        pinpoints = tuple(map(tuple, model.pinpoints))
        return cls(pinpoints, model.vision.image_size, model.vision.grid, model.newline)

    @property
    def patches(self) -> int:
        """Number of patches in a tile."""
        return self.grid**2


@dataclasses.dataclass(frozen=True)
class Look:
    """A decoded picture: its place among the tokens; `cut()` makes its tiles or features."""

    place: Place
    cut: Callable[[], Shaped[np.ndarray, "N ..."]]


class Tiles:
    """Gives pictures as uint8 tiles, for answering and for training with a tower at every step.

    Args:
      store: has the pictures that `stored` and `stored_place` name by key.
    """

    field = "tiles"

    def __init__(self, geometry: Geometry, policy: ReadingPolicy, store: RecordStore | None = None):
        self.geometry, self.policy, self._store = geometry, policy, store
        self.patches = geometry.patches
        self.shape, self.dtype = (geometry.tile_size, geometry.tile_size, 3), np.uint8
        upright = "upright" in (
            policy.orientation,
            store.orientation if store is not None else "stored",
        )
        self._stored_orientation = "upright" if upright else "stored"

    @property
    def sizes_are_indexed(self) -> bool:
        """Whether the store's index has the sizes of its pictures as this reader sees them."""
        return self._store is None or self._store.orientation == self._stored_orientation

    def stored(self, key: str, several: bool, rng: np.random.Generator | None = None) -> Look:
        """A picture of the store. `rng` is not used; only `CachedFeatures` needs it.

        Raises:
          ImageError: the picture is missing or cannot be decoded.
        """
        return self._look(self._encoded(key), key, several, self._stored_orientation)

    def given(self, picture: Any, name: str, several: bool) -> Look:
        """A picture in any form that `pangea_jax.data.image.decode` accepts.

        Args:
          name: the name of the picture in errors.
          several: whether its conversation has more than one picture.

        Raises:
          ImageError: the picture cannot be decoded, or has no pixels.
        """
        return self._look(picture, name, several, self.policy.orientation)

    def _look(self, picture, name, several, orientation) -> Look:
        decoded = image.decode(
            picture, name=name, background=self.policy.background, orientation=orientation
        )
        if min(decoded.size) < 1:
            raise image.ImageError(name, "{} x {} has no pixels".format(*decoded.size))
        padded = several and self.policy.multi_image == "padded"
        place = self.place(decoded.size, several)
        return Look(place, functools.partial(self._cut, decoded, padded))

    def stored_place(self, key: str, several: bool) -> Place:
        """The place of a picture of the store, without decoding it.

        Raises:
          ImageError: the picture is missing.
        """
        if not self.sizes_are_indexed:
            size = image.header_size(self._encoded(key), name=key, orientation="upright")
        elif key in self._sizes:
            size = self._sizes[key]
        else:
            raise image.ImageError(key, "is not in the store", "picture is missing")
        return self.place(size, several)

    def place(self, size: anyres.Size, several: bool) -> Place:
        """The place of a picture of `size` (width, height)."""
        padded = several and self.policy.multi_image == "padded"
        layout = anyres.layout(
            size,
            () if padded else self.geometry.pinpoints,
            self.geometry.tile_size,
            self.geometry.grid,
            self.policy.rounding,
            newline=self.geometry.newline,
        )
        return layout.num_tiles, layout.image_index

    def _cut(self, picture, padded):
        if padded:
            return image.views(_squared(picture), (), self.geometry.tile_size)
        return image.views(picture, self.geometry.pinpoints, self.geometry.tile_size)

    def _encoded(self, key) -> bytes:
        try:
            return self._store.image(key)
        except KeyError:
            raise image.ImageError(key, "is not in the store", "picture is missing") from None

    @functools.cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        table = self._store.image_index
        sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
        return dict(zip(table["key"].to_pylist(), sizes, strict=True))

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_sizes"}


def _squared(picture):
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), PADDING_COLOUR)
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


class CachedFeatures:
    """Gives pictures as features of a frozen tower (`pangea_jax.sample.features`), one tile each.

    Args:
      features: for each key its views [views, P, E]; view 0 is the original, the others are random
        changes of it. Training draws one view at random.
    """

    field = "features"
    sizes_are_indexed = True  # the sizes do not matter

    def __init__(
        self,
        features: Mapping[str, Shaped[np.ndarray, "views P E"]],
        policy: ReadingPolicy = REFERENCE,
        *,
        newline: bool = True,
    ):
        self._features, self.policy = features, policy
        first = next(iter(features.values()))
        self.patches, self.shape, self.dtype = first.shape[1], first.shape[1:], first.dtype
        side = round(self.patches**0.5)
        layout = anyres.layout((side, side), (), side, side, newline=newline)
        self._place = layout.num_tiles, layout.image_index

    def stored(self, key: str, several: bool, rng: np.random.Generator | None = None) -> Look:
        """A view of a picture, drawn with `rng`; without `rng`, view 0."""
        views = self._features[key]
        view = 0 if rng is None else rng.integers(len(views))
        return Look(self._place, lambda: views[view : view + 1])

    def stored_place(self, key: str, several: bool) -> Place:
        """The same place for every picture."""
        return self._place

    def place(self, size: anyres.Size, several: bool) -> Place:
        """The same place for every size."""
        return self._place


class Reader:
    """Reads conversations: words with the tokenizer and the chat template, pictures with `pictures`."""

    def __init__(self, tokenizer: Tokenizer, pictures: Tiles | CachedFeatures):
        self.tokenizer, self.pictures, self.policy = tokenizer, pictures, pictures.policy

    def look(
        self, conversation: Conversation, rng: np.random.Generator | None = None
    ) -> list[Look]:
        """Opens the pictures of a record.

        Raises:
          ImageError: a picture is missing or cannot be decoded.
        """
        several = len(conversation.images) > 1
        return [self.pictures.stored(key, several, rng) for key in conversation.images]

    def places(self, conversation: Conversation) -> list[Place]:
        """The places of a record's pictures, without decoding them.

        Raises:
          ImageError: a picture is missing.
        """
        several = len(conversation.images) > 1
        return [self.pictures.stored_place(key, several) for key in conversation.images]

    def words(
        self, turns: Sequence[Turn], places: Sequence[Place], **options: Any
    ) -> chat.Rendered:
        """The tokens, the loss mask, and the positions of the pictures' features.

        Args:
          places: the places of the pictures, in the order of the `<image>` markers.
          options: `loss_mask`, `system` and `answer_next` of `pangea_jax.data.chat.render`.

        Raises:
          ValueError: the numbers of markers and pictures differ.
        """
        return chat.render(
            turns,
            self.tokenizer,
            [index for _, index in places],
            tiles_per_image=[count for count, _ in places],
            patches=self.pictures.patches,
            move_marker_first=self.policy.marker_first,
            **options,
        )

    def cut(self, looks: Sequence[Look]) -> Shaped[np.ndarray, "N ..."]:
        """Tiles or features of all pictures, one after the other."""
        parts = [look.cut() for look in looks]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([self.no_tiles, *parts])

    @functools.cached_property
    def no_tiles(self) -> Shaped[np.ndarray, "0 ..."]:
        """The tiles or features of a conversation without pictures."""
        return np.zeros((0, *self.pictures.shape), self.pictures.dtype)
