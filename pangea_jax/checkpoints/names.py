"""The one table between our parameters and public checkpoints, read in both directions.

A row is (our path, their name, axes). Their name is a template over the prefixes of a `Layout`. If it has `{layer}`,
one of our stacked parameters is one of their tensors per layer. Axes are written as in einops, theirs before ours:
"(h c) d -> d h c" splits their rows into heads and channels.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from pangea_jax.model import PangeaConfig
from pangea_jax.sharding import quantized_part


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of the model's parts in one family of checkpoints."""

    vision: str
    projector_in: str
    projector_out: str
    newline: str
    decoder: str
    head: str

    def part_of(self, name: str) -> str | None:
        """The part (a key of `PARTS`) of a tensor, by its longest known prefix; None if it has none."""
        matches = [
            (len(prefix), part)
            for part, fields in PARTS.items()
            for prefix in (getattr(self, field) for field in fields)
            if name.startswith(prefix)
        ]
        return max(matches)[1] if matches else None


_LLAVA = Layout(
    vision="model.vision_tower.vision_tower.vision_model.",
    projector_in="model.mm_projector.0.",
    projector_out="model.mm_projector.2.",
    newline="model.image_newline",
    decoder="model.",
    head="lm_head.",
)
_TRANSFORMERS_4 = Layout(
    vision="vision_tower.vision_model.",
    projector_in="multi_modal_projector.linear_1.",
    projector_out="multi_modal_projector.linear_2.",
    newline="image_newline",
    decoder="language_model.model.",
    head="language_model.lm_head.",
)
_MODULES = Layout(
    vision="model.vision_tower.",
    projector_in="model.multi_modal_projector.linear_1.",
    projector_out="model.multi_modal_projector.linear_2.",
    newline="model.image_newline",
    decoder="model.language_model.",
    head="lm_head.",
)

LAYOUTS = {
    # neulab/Pangea-7B: the training code's own names.
    "llava": _LLAVA,
    # neulab/Pangea-7B-hf: what transformers 4.39 to 4.x writes; transformers 5 reads it too.
    "transformers-4": _TRANSFORMERS_4,
    # What `save_pretrained` of transformers 5 writes.
    "transformers-5": dataclasses.replace(_TRANSFORMERS_4, vision="vision_tower."),
    # `state_dict()` of transformers 4.52 and later, and of 5, saved as it is.
    "modules-4": dataclasses.replace(_MODULES, vision="model.vision_tower.vision_model."),
    "modules-5": _MODULES,
    # A CLIP tower or a decoder alone, from which training starts: openai/clip-*, Qwen/Qwen2-*.
    "standalone": dataclasses.replace(_LLAVA, vision="vision_model."),
}

# Parts of the model, as in `load(only=...)`, and the fields of `Layout` with their prefixes.
PARTS = {
    "vision": ("vision",),
    "projector": ("projector_in", "projector_out"),
    "newline": ("newline",),
    "language": ("decoder", "head"),
}

# Buffers that old versions saved with the parameters. They hold nothing that was trained.
BUFFERS = re.compile(r"(\.position_ids|\.rotary_emb\.inv_freq)$")

_NORM = "d -> d"
_LINEAR = "out in -> in out"
_OUT = "d (h c) -> h c d"


def _qkv(ours, theirs, heads):
    """Queries, keys and values; `heads` is our letter for the heads of keys and values."""
    for name, letter in (("q", "h"), ("k", heads), ("v", heads)):
        module = f"{theirs}self_attn.{name}_proj."
        yield f"{ours}.{name}_kernel_d{letter}c", module + "weight", "(h c) d -> d h c"
        yield f"{ours}.{name}_bias_{letter}c", module + "bias", "(h c) -> h c"


def _vision_block(ours):
    theirs = "{vision}encoder.layers.{layer}."
    return (
        (f"{ours}.attention_norm.scale", theirs + "layer_norm1.weight", _NORM),
        (f"{ours}.attention_norm.bias", theirs + "layer_norm1.bias", _NORM),
        *_qkv(ours, theirs, "h"),
        (f"{ours}.o_kernel_hcd", theirs + "self_attn.out_proj.weight", _OUT),
        (f"{ours}.o_bias_d", theirs + "self_attn.out_proj.bias", _NORM),
        (f"{ours}.mlp_norm.scale", theirs + "layer_norm2.weight", _NORM),
        (f"{ours}.mlp_norm.bias", theirs + "layer_norm2.bias", _NORM),
        (f"{ours}.up_kernel_df", theirs + "mlp.fc1.weight", _LINEAR),
        (f"{ours}.up_bias_f", theirs + "mlp.fc1.bias", _NORM),
        (f"{ours}.down_kernel_fd", theirs + "mlp.fc2.weight", _LINEAR),
        (f"{ours}.down_bias_d", theirs + "mlp.fc2.bias", _NORM),
    )


def _decoder_block(ours):
    theirs = "{decoder}layers.{layer}."
    return (
        (f"{ours}.attention_norm.scale", theirs + "input_layernorm.weight", _NORM),
        *_qkv(ours, theirs, "k"),
        (f"{ours}.o_kernel_hcd", theirs + "self_attn.o_proj.weight", _OUT),
        (f"{ours}.mlp_norm.scale", theirs + "post_attention_layernorm.weight", _NORM),
        (f"{ours}.gate_kernel_df", theirs + "mlp.gate_proj.weight", _LINEAR),
        (f"{ours}.up_kernel_df", theirs + "mlp.up_proj.weight", _LINEAR),
        (f"{ours}.down_kernel_fd", theirs + "mlp.down_proj.weight", _LINEAR),
    )


TABLE = (
    ("vision.class_embedding_d", "{vision}embeddings.class_embedding", _NORM),
    ("vision.patch_kernel_hwcd", "{vision}embeddings.patch_embedding.weight", "d c h w -> h w c d"),
    ("vision.position_embedding_sd", "{vision}embeddings.position_embedding.weight", "s d -> s d"),
    ("vision.pre_norm.scale", "{vision}pre_layrnorm.weight", _NORM),  # sic
    ("vision.pre_norm.bias", "{vision}pre_layrnorm.bias", _NORM),
    *_vision_block("vision.blocks"),
    *_vision_block("vision.tail_blocks"),
    ("vision.post_norm.scale", "{vision}post_layernorm.weight", _NORM),
    ("vision.post_norm.bias", "{vision}post_layernorm.bias", _NORM),
    ("projector.in_kernel_ed", "{projector_in}weight", _LINEAR),
    ("projector.in_bias_d", "{projector_in}bias", _NORM),
    ("projector.out_kernel_dd", "{projector_out}weight", _LINEAR),
    ("projector.out_bias_d", "{projector_out}bias", _NORM),
    ("newline_d", "{newline}", _NORM),
    ("language.embedding_vd", "{decoder}embed_tokens.weight", "v d -> v d"),
    *_decoder_block("language.blocks"),
    ("language.final_norm.scale", "{decoder}norm.weight", _NORM),
    ("language.head_kernel_dv", "{head}weight", "v d -> d v"),
)
_ROW_OF = {ours: (theirs, axes) for ours, theirs, axes in TABLE}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the tensors it is made of.

    Attributes:
      path: the dotted name of our parameter.
      names: their names: one per layer if `stacked`, otherwise one.
      axes: the pattern between one of their tensors and one layer of ours.
      shape: the shape of ours, with the leading L if stacked.
    """

    path: str
    names: tuple[str, ...]
    axes: str
    shape: tuple[int, ...]
    stacked: bool

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def their_shape(self) -> tuple[int, ...]:
        groups, ours = _parse(self.axes)
        sizes = dict(zip(ours, self.layer_shape, strict=True))
        return tuple(math.prod(sizes[axis] for axis in group) for group in groups)

    @property
    def major_axis(self) -> int:
        """Our axis that corresponds to the rows of one of their tensors."""
        groups, ours = _parse(self.axes)
        return ours.index(groups[0][0]) + self.stacked

    def block_rows(self, itemsize: int, max_bytes: int) -> int:
        """Length along `major_axis` of even blocks of one layer, each at most about `max_bytes`."""
        size = self.shape[self.major_axis]
        blocks = math.ceil(math.prod(self.layer_shape) * itemsize / max_bytes)
        return math.ceil(size / blocks)

    def blocks(self, itemsize: int, max_bytes: int) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Cuts the parameter into parts of at most about `max_bytes`, each a run of bytes of one tensor.

        Yields (their name, index into ours), tensor by tensor, in the order of their bytes.
        """
        axis, rows = self.major_axis, self.block_rows(itemsize, max_bytes)
        for layer, name in enumerate(self.names):
            index = [slice(None)] * len(self.shape)
            if self.stacked:
                index[0] = slice(layer, layer + 1)
            for start in range(0, self.shape[axis], rows):
                index[axis] = slice(start, min(start + rows, self.shape[axis]))
                yield name, tuple(index)


def entries(
    shapes: dict[str, tuple[int, ...]], config: PangeaConfig, layout: Layout
) -> list[Entry]:
    """Entries for our parameters `shapes` (dotted path to shape), in their order."""
    prefixes = dataclasses.asdict(layout)
    out = []
    for path, shape in shapes.items():
        kernel, part = quantized_part(path)
        theirs, axes = _ROW_OF[kernel]
        theirs += part and f".{part}"
        stacked = "{layer}" in theirs
        first = config.vision.used_layers if path.startswith("vision.tail_blocks.") else 0
        layers = range(first, first + shape[0]) if stacked else (None,)
        names = tuple(theirs.format(**prefixes, layer=layer) for layer in layers)
        out.append(Entry(path, names, axes, tuple(shape), stacked))
    return out


def part_of_path(path: str) -> str:
    """The part (a key of `PARTS`) that one of our parameters belongs to."""
    return "newline" if path == "newline_d" else path.split(".")[0]


@functools.cache
def _parse(axes):
    """Their axes as groups of our letters, and our axes in order."""
    theirs, ours = axes.split("->")
    groups = re.findall(r"\([^)]*\)|\S+", theirs)
    return tuple(tuple(group.strip("()").split()) for group in groups), tuple(ours.split())


def read_part(tensor, axes: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """`ours[index]`, contiguous; ours has `shape` and is their `tensor` with rearranged axes.

    It slices `tensor` along the first axis of each group: a device that holds some of the heads reads only the rows of
    those heads.
    """
    groups, ours = _parse(axes)
    sizes = dict(zip(ours, shape, strict=True))
    bounds = {
        axis: slice(*part.indices(size)[:2])
        for axis, size, part in zip(ours, shape, index, strict=True)
    }
    block = []
    for major, *minor in groups:
        stride = math.prod(sizes[axis] for axis in minor)
        block.append(slice(bounds[major].start * stride, bounds[major].stop * stride))
        sizes[major] = bounds[major].stop - bounds[major].start
        bounds[major] = slice(None)
    flat = [axis for group in groups for axis in group]
    part = tensor[tuple(block)].reshape([sizes[axis] for axis in flat])
    part = part.transpose([flat.index(axis) for axis in ours])
    return _contiguous(part[tuple(bounds[axis] for axis in ours)])


def to_theirs(ours: np.ndarray, axes: str) -> np.ndarray:
    """One layer of ours, or a part of it along the major axis, as their tensor, contiguous."""
    groups, order = _parse(axes)
    sizes = dict(zip(order, ours.shape, strict=True))
    flat = [axis for group in groups for axis in group]
    theirs = ours.transpose([order.index(axis) for axis in flat])
    shape = [math.prod(sizes[axis] for axis in group) for group in groups]
    return _contiguous(theirs).reshape(shape)


def _contiguous(x: np.ndarray, tile: int = 128) -> np.ndarray:
    """Copies a transposed view in tiles that fit the processor's cache: six times as fast as NumPy's own copy."""
    last = x.ndim - 1
    nearest = min(
        range(x.ndim), key=lambda axis: abs(x.strides[axis]) if x.shape[axis] > 1 else math.inf
    )
    if x.flags.c_contiguous or nearest == last:
        return np.ascontiguousarray(x)
    out = np.empty(x.shape, x.dtype)
    source, target = (np.moveaxis(array, (nearest, last), (-2, -1)) for array in (x, out))
    rows, columns = source.shape[-2:]
    for outer in np.ndindex(source.shape[:-2]):
        for i in range(0, rows, tile):
            for j in range(0, columns, tile):
                part = (*outer, slice(i, i + tile), slice(j, j + tile))
                target[part] = source[part]
    return out
