"""Writes the files that transformers and vLLM need with the weights: tokenizer, picture processor, chat template."""

from pathlib import Path

from pangea_jax.data.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IMAGE,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerJson,
)
from pangea_jax.model import PangeaConfig
from pangea_jax.model.vision import CLIP_MEAN, CLIP_STD
from pangea_jax.work import atomic
from pangea_jax.work.atomic import write_json
from pangea_jax.work.untrusted import parse_json

# ChatML as `pangea_jax.data.chat` renders it: a system message comes first, and each picture is on its own line.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{{- '\\n' if not loop.first else '' }}
{{- '<image>' if part['type'] in ('image', 'image_url') else part['text'] }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write(folder: Path, config: PangeaConfig, tokenizer: Tokenizer, files: Path) -> list[str]:
    """Writes the files for a model. Returns sentences about what transformers cannot do with them.

    Args:
      files: the folder or file that `tokenizer` came from.
    """
    notes = []
    write_json(folder / "preprocessor_config.json", picture_processor(config))
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = files / "tokenizer.model" if files.is_dir() else files
        (folder / "tokenizer.model").write_bytes(model.read_bytes())
        notes.append(
            "transformers loads the weights, but has no tokenizer class for the SentencePiece model "
            "with ChatML markers, so AutoProcessor cannot be used; pangea_jax.load can"
        )
    else:
        _write_tokenizer(folder, config, tokenizer, files)
        write_json(folder / "processor_config.json", _processor(config))
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        # Where transformers before 4.49 looks for it.
        write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    if config.newline and not config.pinpoints:
        notes.append(
            "transformers does not support pictures of a single view with a newline vector: there the model "
            "answers text only; pangea_jax answers pictures too"
        )
    return notes


def picture_processor(config: PangeaConfig) -> dict:
    """preprocessor_config.json: CLIP's normalisation, LLaVA-NeXT's canvases as (height, width)."""
    size = config.vision.image_size
    name = "LlavaNextImageProcessor" if config.newline else "CLIPImageProcessor"
    canvases = [[height, width] for width, height in config.pinpoints]
    return {
        "image_processor_type": name,
        "processor_class": _processor(config)["processor_class"],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    } | ({"do_pad": True, "image_grid_pinpoints": canvases} if config.newline else {})


def _processor(config: PangeaConfig) -> dict:
    """processor_config.json. With it the processor repeats `<image>` for each picture feature."""
    return {
        "processor_class": "LlavaNextProcessor" if config.newline else "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # CLIP's class token, which "default" removes again
    }


def _write_tokenizer(folder: Path, config, tokenizer: TokenizerJson, files: Path):
    """Writes tokenizer.json with `<image>`, and tokenizer_config.json that agrees with it."""
    with atomic.writing(folder / "tokenizer.json") as file:
        tokenizer.save(file)
        added = parse_json(file.read_text())["added_tokens"]
    beside = (files if files.is_dir() else files.parent) / "tokenizer_config.json"
    content = parse_json(beside.read_text()) if beside.is_file() else {}
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": config.language.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    ours = {
        "added_tokens_decoder": {
            str(token.pop("id")): token for token in sorted(added, key=lambda token: token["id"])
        },
        "processor_class": _processor(config)["processor_class"],
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", defaults | content | ours)
