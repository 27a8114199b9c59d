"""Model FLOPs of a training step, counted from the shapes of the parameters.

The convention:

- A multiplication and an addition are two FLOPs. A kernel costs 2 per entry and position that it is applied to. Norms,
  activations, softmax and embeddings cost nothing.
- The backward pass costs the same again for the gradient of a kernel that trains, and the same again for the gradient
  of its input if anything before it trains. If everything trains, a step costs 3 forward passes.
- Recomputation to save memory does not count. The decoder's attention is causal and counts half, because its kernels
  skip the rest. A packed row counts as one sequence.

MFU is these FLOPs per second divided by the peak of the chips.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax

from pangea_jax.model import PangeaConfig
from pangea_jax.model import params as model_params
from pangea_jax.sharding import quantized_part

# Dense bfloat16 FLOPs a second of one chip, by `jax.Device.device_kind` (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
# Kernels of matrix products in the order in which a step uses them. Stacked layers share a line: the input of one layer
# depends on the parameters of the others.
_STAGES = (
    r"vision\.patch_kernel_hwcd",
    r"vision\.blocks\..*_kernel_\w+",
    r"projector\.in_kernel_ed",
    r"projector\.out_kernel_dd",
    r"language\.blocks\..*(_kernel_|_lora\.[ab]_)\w+",
    r"language\.head_kernel_dv",
)
_TOWER, _DECODER, _HEAD = 1, 4, 5
_FIRST_USE = (  # the stage at which other parameters enter
    (r"vision\.(class_embedding_d|position_embedding_sd|pre_norm\..*)", 0),
    (r"vision\.blocks\..*", _TOWER),
    (r"projector\.in_bias_d", 2),
    (r"projector\.out_bias_d|newline_d|language\.embedding_vd", 3),
    (r"language\.blocks\..*", _DECODER),
    (r"language\.final_norm\.scale", _DECODER),
)


def train_flops(
    config: PangeaConfig,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    tokens: int,
    row_tokens: int,
    tiles: int,
    targets: int | None = None,
    frozen: Sequence[str] = (),
) -> dict[str, float]:
    """FLOPs of one step: `vision`, `projector`, `language`, `attention` (the decoder's), `head`, `total`.

    Args:
      shapes: shapes of all parameters by name.
      tokens, row_tokens: tokens of the batch, and of one row.
      tiles: tiles in the batch; 0 if the tower's features were computed before.
      targets: places in the batch on which the output head runs; None means every token.
      frozen: patterns of parameters that do not train.
    """
    vision = config.vision
    trains = set(shapes) - model_params.select(shapes, frozen)  # no codes or scales
    if not tiles:
        trains = {name for name in trains if not name.startswith("vision.")}
    first = min((_stage(name) for name in trains), default=len(_STAGES))
    patches, seen = tiles * vision.patches, vision.patches + 1  # `seen`: with the class token
    targets = tokens if targets is None else targets
    positions = (patches, tiles * seen, patches, patches, tokens, targets)
    parts = dict.fromkeys(("vision", "projector", "language", "attention", "head"), 0.0)
    for name, size in _sizes(shapes).items():
        stage = next((i for i, p in enumerate(_STAGES) if re.fullmatch(p, name)), None)
        if name == "language.embedding_vd" and config.language.tied_head:
            stage = _HEAD
        if stage is not None:
            stacked = stage in (_TOWER, _DECODER)
            passes = 1 + (name in trains) + (first < stage or (stacked and first == stage))
            part = "head" if stage == _HEAD else name.split(".")[0]
            parts[part] += 2 * passes * positions[stage] * size
    # Attention is two products, queries by keys and weights by values. Each has the gradients of two inputs.
    one_pass = 4 * tiles * seen * seen * vision.width * vision.used_layers
    parts["vision"] += one_pass * (3 if first <= _TOWER else 1)
    width = config.language.heads * config.language.head_width
    one_pass = 4 * tokens * (row_tokens / 2) * width * config.language.layers
    parts["attention"] = one_pass * (3 if first <= _DECODER else 1)
    return parts | {"total": sum(parts.values())}


def _sizes(shapes) -> dict[str, int]:
    """The number of values of each parameter. In 4 bits, two are in a byte."""
    sizes = {name: math.prod(leaf.shape) for name, leaf in shapes.items()}
    for name in [name for name in sizes if quantized_part(name)[1]]:
        size, (kernel, part) = sizes.pop(name), quantized_part(name)
        if part == "codes":
            sizes[kernel] = size * (1 if shapes[name].dtype == "int8" else 2)
    return sizes


def _stage(name: str) -> int:
    """The first stage whose output a parameter changes."""
    patterns = [(pattern, stage) for stage, pattern in enumerate(_STAGES)]
    return next((s for p, s in [*patterns, *_FIRST_USE] if re.fullmatch(p, name)), len(_STAGES))
