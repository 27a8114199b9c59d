"""Model FLOPs of a training step, counted from the shapes of the parameters.

The convention: a multiplication and an addition are two FLOPs. Every kernel costs 2 per entry and position that it
is applied to; norms, activations, softmax and embeddings cost nothing. The backward pass costs the same again for the
gradient of a kernel that trains, and the same again for the gradient of its input if anything before it trains: if
everything trains, a step costs 3 forward passes. Recomputation to save memory is not counted. The decoder's attention
is causal and counts half, since its kernels skip the rest; a packed row counts as one sequence. MFU is these FLOPs a
second over the peak of the chips.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax

from pangea_jax.model import PangeaConfig
from pangea_jax.model import params as model_params

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
# Kernels of matrix products in the order in which a step uses them. The layers of one line are stacked: the input of a
# layer depends on the parameters of the others.
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
      shapes: of all parameters by name.
      tokens: of the batch; `row_tokens` of one row.
      tiles: pictures' views in the batch; 0 if the tower's features were computed before.
      targets: places in the batch on which the output head runs; None: every token.
      frozen: patterns of parameters that do not train.
    """
    vision, language = config.vision, config.language
    trains = set(shapes) - model_params.select(shapes, frozen)
    if not tiles:
        trains = {name for name in trains if not name.startswith("vision.")}
    first = min((_stage(name) for name in trains), default=len(_STAGES))
    patches = tiles * vision.patches
    positions = (
        patches,
        tiles * (vision.patches + 1),
        patches,
        patches,
        tokens,
        tokens if targets is None else targets,
    )
    parts = dict.fromkeys(("vision", "projector", "language", "attention", "head"), 0.0)
    for name, leaf in shapes.items():
        stage = next((i for i, p in enumerate(_STAGES) if re.fullmatch(p, name)), None)
        if name == "language.embedding_vd" and language.tied_head:
            stage = _HEAD
        if stage is not None:
            stacked = stage in (_TOWER, _DECODER)
            passes = 1 + (name in trains) + (first < stage or (stacked and first == stage))
            part = "head" if stage == _HEAD else name.split(".")[0]
            parts[part] += 2 * passes * positions[stage] * math.prod(leaf.shape)
    # Two products, queries by keys and weights by values; each has the gradients of two inputs.
    seen = vision.patches + 1
    one_pass = 4 * positions[_TOWER] * seen * vision.width * vision.used_layers
    parts["vision"] += one_pass * (3 if first <= _TOWER else 1)
    one_pass = (
        4 * tokens * (row_tokens / 2) * language.heads * language.head_width * language.layers
    )
    parts["attention"] = one_pass * (3 if first <= _DECODER else 1)
    return parts | {"total": sum(parts.values())}


def _stage(name: str) -> int:
    """The first stage whose output a parameter changes."""
    patterns = [(pattern, stage) for stage, pattern in enumerate(_STAGES)]
    return next((s for p, s in [*patterns, *_FIRST_USE] if re.fullmatch(p, name)), len(_STAGES))
