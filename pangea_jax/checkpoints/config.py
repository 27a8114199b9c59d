"""Reads and writes config.json of the public layouts as `PangeaConfig`."""

import ast
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from pangea_jax.checkpoints import orbax
from pangea_jax.checkpoints.files import CheckpointError, TensorFiles
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.model import (
    PINPOINTS,
    LanguageConfig,
    PangeaConfig,
    RopeScaling,
    VisionConfig,
    quantized,
)
from pangea_jax.work import paths, untrusted

# transformers does not write values to config.json that equal these defaults.
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
}
_COMMON_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_DECODER_DEFAULTS = {
    "qwen2": _COMMON_DEFAULTS
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "llama": _COMMON_DEFAULTS
    | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _COMMON_DEFAULTS
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}

# Our sizes and the keys of config.json that hold them, read and written.
_VISION_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}
_DECODER_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}

# Kinds of rotary scaling that are computed, and their keys. The frequencies of transformers' "dynamic" and "longrope"
# depend on the longest prompt of a batch.
_CONTEXT = "original_max_position_embeddings"
_YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _CONTEXT),
    "proportional": ("factor",),
    "yarn": ("factor", _CONTEXT, *_YARN_KEYS),
}

# LLaVA's own layout has the name of the tower instead of its sizes.
_TOWERS = {
    "openai/clip-vit-large-patch14-336": VisionConfig(),
    "openai/clip-vit-large-patch14": VisionConfig(image_size=224),
}


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Token ids that config.json holds."""

    image: int
    end: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        return cls(tokenizer.image_id, tokenizer.im_end_id, tokenizer.pad_id)


PANGEA_TOKENS = SpecialTokens(image=151646, end=151645, pad=151643)


_MOST_BYTES = 16 << 20  # of config.json
_MOST_TEXT = 1 << 16  # of a list of canvases that is written as a text


class _Fields:
    """One section of config.json. Reads it with defaults, and refuses values that the model does not support."""

    def __init__(self, file: Path, section: str, values: dict, defaults: dict | None = None):
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise CheckpointError(f"{file}: {section.removesuffix('.')} is a {kind}, not an object")
        self.file, self.section = file, section
        self.values = (defaults or {}) | values

    def __call__(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def require(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise CheckpointError(f"{self.file}: no {self.section}{key}")
        return self.values[key]

    def number(self, key: str) -> int | float:
        value = self.require(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise self.refuse(key, value, "a positive number")
        return value

    def expect(self, key: str, *allowed, default: Any = None):
        value = self.values.get(key, default)
        if value not in allowed:
            raise self.refuse(key, value, " or ".join(map(repr, allowed)))

    def refuse(self, key: str, value: Any, supported: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: {self.section}{key} is {value!r:.200}, but only {supported} is supported"
        )


def config_from_folder(path: str | os.PathLike) -> PangeaConfig:
    """Sizes from config.json of any of the public layouts, of our own form, or of a training run.

    If the folder has weights, the vocabulary size is that of the embedding tensor, because some config.json disagree
    with it. The `dtype` of activations stays at its default.

    LLaVA's layout writes canvases as (width, height), transformers' as (height, width). neulab/Pangea-7B-hf has LLaVA's
    list unchanged in transformers' layout. Pictures smaller than 336 pixels fit 336 x 672 and 672 x 336 equally well.
    With that list they get another of the two than in training. To get the canvases of training, replace `pinpoints` by
    `pangea_jax.model.PINPOINTS`.

    Raises:
      FileNotFoundError: there is no config.json.
      CheckpointError: the model is no LLaVA or LLaVA-NeXT, or has a part that is not supported.
    """
    file, values = read_config(path)
    try:
        config = _from_values(file, values, paths.path(path))
    except CheckpointError:
        raise
    # A field of another type than any version of any layout has.
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{file} is no config of this model ({error})") from None
    _check_ranges(file, config)
    return config


def _from_values(file: Path, values: dict, path: Path) -> PangeaConfig:
    if isinstance(values.get("model"), dict):
        return _from_run(file, values["model"])
    if "mm_vision_tower" in values:
        config = _from_llava(_Fields(file, "", values))
    elif values.get("model_type") in ("llava_next", "llava"):
        config = _from_transformers(_Fields(file, "", values))
    else:
        raise CheckpointError(
            f"{file}: model_type {values.get('model_type')!r} without mm_vision_tower is no LLaVA; "
            "to load a decoder or a tower alone, pass config= and only=('language',) or "
            "only=('vision',)"
        )
    language = dataclasses.replace(config.language, weights=_form(file, values))
    return _with_vocabulary_of_tensor(dataclasses.replace(config, language=language), path)


_QUANTIZATION = "quantization_config"  # transformers refuses a method that it does not know
_METHOD = "pangea_jax"


def _form(file: Path, values: dict) -> str:
    """The form of weights in 8 or 4 bits, as `to_transformers` writes it; "" for others."""
    found = values.get(_QUANTIZATION)
    if not found:
        return ""
    fields = _Fields(file, f"{_QUANTIZATION}.", found)
    method = fields("quant_method")
    if method != _METHOD:
        raise CheckpointError(
            f"{file}: the weights are quantised by {method!r:.200}, which is not read; give the model from which "
            "they were made, with weights='int8' or 'int4'"
        )
    fields.expect("weights", *quantized.FORMS)
    return fields("weights")


# The largest sizes of a model. Without them, a config alone could take all memory.
_MOST = {
    "image_size": 1 << 14,
    "patch_size": 1 << 14,
    "width": 1 << 18,
    "layers": 1 << 10,
    "heads": 1 << 12,
    "kv_heads": 1 << 12,
    "head_width": 1 << 14,
    "mlp": 1 << 21,
    "vocab_size": 1 << 23,
    "max_positions": 1 << 28,
    "scan_unroll": 1 << 10,
}
_MOST_REAL = {"norm_eps": 1.0, "rope_theta": 1e15, "final_norm_scale": 1e6}
_MOST_CANVASES, _MOST_CANVAS = 1 << 10, 1 << 17
_DTYPES = ("float32", "bfloat16", "float16")


def _check_ranges(file: Path, config: PangeaConfig) -> None:
    """Raises CheckpointError if a size is no whole number within its range. Nothing is allocated before."""

    def refuse(name: str, value: Any, wanted: str):
        raise CheckpointError(f"{file}: {name} is {value!r:.80}, expected {wanted}")

    for section, part in (("vision", config.vision), ("language", config.language)):
        for name, value in vars(part).items():
            if name in _MOST and not _is_size(value, _MOST[name]):
                refuse(f"{name} of {section}", value, f"a whole number from 1 to {_MOST[name]:,}")
            if name in _MOST_REAL:
                real = isinstance(value, int | float) and not isinstance(value, bool)
                if not (real and 0 < value <= _MOST_REAL[name]):
                    limit = f"a number above 0, up to {_MOST_REAL[name]:g}"
                    refuse(f"{name} of {section}", value, limit)
    sides = [side for canvas in config.pinpoints for side in canvas]
    if len(config.pinpoints) > _MOST_CANVASES:
        refuse("the number of canvases", len(config.pinpoints), f"at most {_MOST_CANVASES:,}")
    for side in sides:
        if not _is_size(side, _MOST_CANVAS):
            refuse("a side of a canvas", side, f"a whole number from 1 to {_MOST_CANVAS:,}")
    if config.dtype not in _DTYPES:
        refuse("dtype", config.dtype, " or ".join(_DTYPES))


def _is_size(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def read_config(path: str | os.PathLike) -> tuple[Path, dict]:
    """The path of a folder's config.json, and its content."""
    location = orbax.find(path)
    file = location.config if location else paths.path(path) / "config.json"
    try:
        values = untrusted.parse_json(untrusted.read_regular(file, _MOST_BYTES))
    except (untrusted.NotRegular, untrusted.TooLarge) as error:
        raise CheckpointError(str(error)) from None
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"no config.json in {file.parent}; give the folder of a model, or for weights alone "
            "config=PangeaConfig(...)"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__}, not a JSON object")
    return file, values


def image_token(path: str | os.PathLike) -> int | None:
    """The id of `<image>` in config.json of a folder in one of transformers' layouts; None if it is not there."""
    _, values = read_config(path)
    value = values.get("image_token_index", values.get("image_token_id"))
    return value if isinstance(value, int) else None


def _from_run(file: Path, model: dict) -> PangeaConfig:
    """`config.model` of a training run, as `launch/train.py` wrote it."""
    try:
        parts = dict(model)
        vision = VisionConfig(**parts.pop("vision"))
        language = LanguageConfig(**parts.pop("language"))
        pinpoints = tuple((int(w), int(h)) for w, h in parts.pop("pinpoints", PINPOINTS))
        return PangeaConfig(vision=vision, language=language, pinpoints=pinpoints, **parts)
    except (TypeError, KeyError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{file}: `model` is no config of this model ({error})") from None


def _with_vocabulary_of_tensor(config: PangeaConfig, path: Path) -> PangeaConfig:
    try:
        files = TensorFiles(path)
    except FileNotFoundError:
        return config
    for name, shape in files.shapes.items():
        if name.endswith("embed_tokens.weight"):
            language = dataclasses.replace(config.language, vocab_size=shape[0])
            return dataclasses.replace(config, language=language)
    return config


def _from_llava(fields: _Fields) -> PangeaConfig:
    # model_type is that of the decoder, as "qwen2" in neulab/Pangea-7B.
    model_type = fields.require("model_type")
    kind = "qwen2" if "qwen" in model_type else "mistral" if "mistral" in model_type else "llama"
    fields.expect("mm_projector_type", "mlp2x_gelu")
    fields.expect("mm_vision_select_feature", "patch", default="patch")
    tower = fields.require("mm_vision_tower")
    if tower not in _TOWERS:
        raise fields.refuse("mm_vision_tower", tower, " or ".join(_TOWERS))
    feature_layer = fields("mm_vision_select_layer", -2)
    vision = dataclasses.replace(_TOWERS[tower], feature_layer=feature_layer)
    anyres = fields("image_aspect_ratio") == "anyres"
    fields.expect("mm_patch_merge_type", "spatial_unpad", *(() if anyres else ("flat", None)))
    return PangeaConfig(
        vision=vision,
        language=_decoder(_Fields(fields.file, "", fields.values, _DECODER_DEFAULTS[kind]), kind),
        pinpoints=_pinpoints(fields, fields.require("image_grid_pinpoints")) if anyres else (),
        newline=fields("mm_patch_merge_type") == "spatial_unpad",
    )


def _pinpoints(fields, value):
    """The pairs of a list. In some LLaVA checkpoints the list is a text."""
    try:
        pairs = ast.literal_eval(value[:_MOST_TEXT]) if isinstance(value, str) else value
        if not all(isinstance(part, list | tuple) for part in (pairs, *pairs)):
            raise TypeError
        return tuple((int(first), int(second)) for first, second in pairs)
    except (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError):
        raise fields.refuse("image_grid_pinpoints", value, "a list of pairs") from None


def _from_transformers(fields: _Fields) -> PangeaConfig:
    fields.expect("projector_hidden_act", "gelu", default="gelu")
    fields.expect("multimodal_projector_bias", True, default=True)
    fields.expect("vision_feature_select_strategy", "default", default="default")
    text = fields("text_config") or {}
    kind = _Fields(fields.file, "text_config.", text)("model_type", "llama")
    if kind not in _DECODER_DEFAULTS:
        raise fields.refuse("text_config.model_type", kind, " or ".join(_DECODER_DEFAULTS))
    # Depending on the version, a tie is written at the top, in text_config, or in both.
    if "tie_word_embeddings" not in text and "tie_word_embeddings" in fields.values:
        text = text | {"tie_word_embeddings": fields("tie_word_embeddings")}
    language = _decoder(_Fields(fields.file, "text_config.", text, _DECODER_DEFAULTS[kind]), kind)
    anyres = fields("model_type") == "llava_next"
    pinpoints = fields("image_grid_pinpoints")
    if pinpoints is None:
        pinpoints = PINPOINTS  # the same numbers are transformers' default, as (height, width)
    return PangeaConfig(
        vision=_vision(fields),
        language=language,
        pinpoints=tuple((w, h) for h, w in _pinpoints(fields, pinpoints)) if anyres else (),
        newline=anyres,
    )


def _vision(fields: _Fields) -> VisionConfig:
    section = fields("vision_config")
    if section is None:
        large = VisionConfig()
        return dataclasses.replace(large, feature_layer=_feature_layer(fields, large.layers))
    vision = _Fields(fields.file, "vision_config.", section, _VISION_DEFAULTS)
    vision.expect("model_type", "clip_vision_model", default="clip_vision_model")
    vision.expect("hidden_act", "quick_gelu")
    vision.expect("num_channels", 3)
    sizes = {ours: vision.number(theirs) for ours, theirs in _VISION_KEYS.items()}
    return VisionConfig(feature_layer=_feature_layer(fields, sizes["layers"]), **sizes)


def _feature_layer(fields: _Fields, layers: int) -> int:
    value = fields("vision_feature_layer", -2)
    if not isinstance(value, int):
        raise fields.refuse("vision_feature_layer", value, "one layer")
    return value if value < 0 else value - layers - 1


def _decoder(fields: _Fields, kind: str) -> LanguageConfig:
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False, default=False)
    fields.expect("mlp_bias", False, default=False)
    sizes = {ours: fields.number(theirs) for ours, theirs in _DECODER_KEYS.items()}
    window = fields("sliding_window") if fields("use_sliding_window", kind == "mistral") else None
    if window is not None and window < sizes["max_positions"]:
        raise fields.refuse(
            "sliding_window", window, "null, or no less than max_position_embeddings"
        )
    return LanguageConfig(
        **sizes,
        kv_heads=fields("num_key_value_heads") or sizes["heads"],
        head_width=fields("head_dim") or sizes["width"] // sizes["heads"],
        **_rope(fields, sizes["max_positions"]),
        qkv_bias=kind == "qwen2",
        tied_head=bool(fields("tie_word_embeddings", False)),
    )


def _rope(fields: _Fields, max_positions: int) -> dict[str, Any]:
    """Base and scaling of the rotary positions, as `LanguageConfig` has them.

    transformers 5 writes `rope_parameters`; earlier versions write `rope_theta` and `rope_scaling`. If both are there,
    transformers takes `rope_scaling`, and of `rope_parameters` not even the base.
    """
    key = "rope_scaling" if fields("rope_scaling") else "rope_parameters"
    values = fields(key) or {}
    if not isinstance(values, dict):
        raise fields.refuse(key, values, "an object")
    defaults = {name: fields(name) for name in ("rope_theta", "partial_rotary_factor")}
    rope = _Fields(fields.file, f"{fields.section}{key}.", values, defaults)
    kind = rope("rope_type", rope("type", "default"))
    if kind not in _ROPE_KEYS:
        raise rope.refuse("rope_type", kind, " or ".join(map(repr, _ROPE_KEYS)))
    found = {"rope_theta": float(rope.number("rope_theta"))}
    if kind == "default":
        return found
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
    for unknown in sorted(set(values) - known):
        raise rope.refuse(unknown, values[unknown], f"{kind!r} without this key")
    # A field beside the section counts more than the one within it.
    original = fields(_CONTEXT) or rope(_CONTEXT) or max_positions
    try:
        scaling = _rope_scaling(rope, kind, original, max_positions)
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{fields.file}: {fields.section}{key}: {error}") from None
    return found | {"rope_scaling": scaling}


def _rope_scaling(rope: _Fields, kind: str, original: int, max_positions: int) -> RopeScaling:
    share = rope("partial_rotary_factor") or 1.0
    if kind == "proportional":
        return RopeScaling(kind, float(rope("factor", 1.0)), rotary_share=float(share))
    if share != 1:
        raise rope.refuse("partial_rotary_factor", share, "1")
    if kind == "yarn" and rope("factor", "none") is None:
        factor = max_positions / original
    else:
        factor = float(rope.number("factor"))
    if kind == "linear":
        return RopeScaling(kind, factor)
    if kind == "llama3":
        ends = {name: float(rope.number(name)) for name in ("low_freq_factor", "high_freq_factor")}
        return RopeScaling(kind, factor, original, **ends)
    return RopeScaling(
        kind,
        factor,
        original,
        attention_factor=_yarn_attention(rope, factor),
        beta_fast=float(rope("beta_fast") or 32),
        beta_slow=float(rope("beta_slow") or 1),
        truncate=bool(rope("truncate", True)),
    )


def _yarn_attention(rope: _Fields, factor: float) -> float:
    """YaRN's factor of cosines and sines, from `mscale` and `mscale_all_dim` if they are there (DeepSeek)."""
    if rope("attention_factor") is not None:
        return float(rope("attention_factor"))

    def scale(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    both = rope("mscale"), rope("mscale_all_dim")
    return scale(both[0]) / scale(both[1]) if all(both) else scale(1)


def to_transformers(config: PangeaConfig, dtype: str, tokens: SpecialTokens) -> dict:
    """config.json that transformers 4 and 5 read as the same model.

    They do not support a single tile with a newline vector (no pinpoints). Such a model loads there with an empty list
    of canvases and answers text, but not pictures.

    Raises:
      ValueError: a special token is outside of the vocabulary.
    """
    for name, value in dataclasses.asdict(tokens).items():
        if not 0 <= value < config.language.vocab_size:
            raise ValueError(
                f"special token {name}={value} is outside of the vocabulary of "
                f"{config.language.vocab_size}; pass tokens=SpecialTokens(...) with the ids of the "
                "tokenizer"
            )
    if config.pinpoints and not config.newline:
        raise ValueError("pinpoints without a newline vector: no public layout has this")
    family, form = "LlavaNext" if config.newline else "Llava", config.language.weights
    pinpoints = {"image_grid_pinpoints": [[height, width] for width, height in config.pinpoints]}
    return {
        "architectures": [f"{family}ForConditionalGeneration"],
        "model_type": "llava_next" if config.newline else "llava",
        # The version of this form. Without it transformers 5.19 warns of a wrong tokenizer.
        "transformers_version": "4.45.0",
        **(pinpoints if config.newline else {}),
        "image_seq_length": config.vision.patches,
        "image_token_index": tokens.image,
        "ignore_index": -100,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.language.tied_head,
        "torch_dtype": dtype,
        **({_QUANTIZATION: {"quant_method": _METHOD, "weights": form}} if form else {}),
        "text_config": _text_section(config.language, dtype, tokens),
        "vision_config": _vision_section(config.vision, dtype),
    }


def _vision_section(vision: VisionConfig, dtype: str) -> dict:
    return {
        "model_type": "clip_vision_model",
        **{theirs: getattr(vision, ours) for ours, theirs in _VISION_KEYS.items()},
        "hidden_act": "quick_gelu",
        "torch_dtype": dtype,
    }


def _text_section(language: LanguageConfig, dtype: str, tokens: SpecialTokens) -> dict:
    kind, rope = "qwen2" if language.qkv_bias else "llama", _rope_section(language.rope_scaling)
    section = {
        "model_type": kind,
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[kind]],
        **{theirs: getattr(language, ours) for ours, theirs in _DECODER_KEYS.items()},
        "num_key_value_heads": language.kv_heads,
        "hidden_act": "silu",
        # transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 reads all.
        "rope_theta": language.rope_theta,
        "rope_parameters": rope | {"rope_theta": language.rope_theta},
        **({"rope_scaling": rope} if language.rope_scaling.kind != "default" else {}),
        "tie_word_embeddings": language.tied_head,
        "eos_token_id": tokens.end,
        "pad_token_id": tokens.pad,
        "torch_dtype": dtype,
    }
    if language.head_width * language.heads != language.width:
        section["head_dim"] = language.head_width
    return section


def _rope_section(scaling: RopeScaling) -> dict:
    """`rope_scaling` of config.json, without the base."""
    values = dataclasses.asdict(scaling) | {
        _CONTEXT: scaling.original_positions,
        "partial_rotary_factor": scaling.rotary_share,
    }
    keys = [key for key in _ROPE_KEYS[scaling.kind] if key in values]
    if scaling.kind == "proportional":
        keys.append("partial_rotary_factor")
    return {"rope_type": scaling.kind} | {key: values[key] for key in keys}


def generation_config(tokens: SpecialTokens) -> dict:
    """generation_config.json: greedy decoding, as in PangeaBench."""
    return {"do_sample": False, "eos_token_id": tokens.end, "pad_token_id": tokens.pad}
