"""The files for transformers: its processor must give the same inputs as our own code."""

import json
import shutil

import numpy as np
import pytest

from pangea_jax import anyres, checkpoints
from pangea_jax.checkpoints import CheckpointError, config, processor
from pangea_jax.data import chat, image
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.model import LanguageConfig, PangeaConfig, VisionConfig
from pangea_jax.model.vision import CLIP_MEAN, CLIP_STD
from pangea_jax.sample import emoji
from pangea_jax.work import atomic

CONFIG = PangeaConfig(language=LanguageConfig(width=8, layers=1, heads=2, kv_heads=1, head_width=4))
SIZES = [
    (640, 480),
    (480, 640),
    (336, 336),
    (100, 100),
    (1000, 300),
    (300, 1000),
    (333, 500),
    (1200, 627),
    (37, 1),
    (1, 1),
]


@pytest.fixture(scope="module")
def exported(qwen2_folder, tmp_path_factory):
    """A folder as `convert` writes it, but without weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = load_tokenizer(qwen2_folder, image_id=config.PANGEA_TOKENS.image)
    assert processor.write(folder, CONFIG, tokenizer, qwen2_folder) == []
    content = config.to_transformers(CONFIG, "float32", config.PANGEA_TOKENS)
    atomic.write_json(folder / "config.json", content)
    return folder, tokenizer


@pytest.fixture(scope="module")
def theirs(exported):
    pytest.importorskip("torch", reason="torch is in requirements-parity.txt")
    transformers = pytest.importorskip("transformers", reason="is in requirements-parity.txt")
    return transformers.AutoProcessor.from_pretrained(exported[0])


def ours(tokenizer, messages):
    """Tokens and normalised tiles as `pangea_jax.generate` makes them."""
    system, turns, pictures = chat.from_messages(messages)
    sizes = [picture.size for picture in pictures]
    vision = CONFIG.vision
    layouts = [
        anyres.layout(size, CONFIG.pinpoints, vision.image_size, vision.grid, "transformers")
        for size in sizes
    ]
    rendered = chat.render(
        turns,
        tokenizer,
        [layout.image_index for layout in layouts],
        tiles_per_image=[layout.num_tiles for layout in layouts],
        patches=vision.patches,
        system=system,
        answer_next=turns[-1].role == "user",
    )
    tiles = [image.views(p, CONFIG.pinpoints, vision.image_size) for p in pictures]
    return rendered.tokens.tolist(), [(t / 255 - CLIP_MEAN) / CLIP_STD for t in tiles]


def their_inputs(theirs, messages):
    return theirs.apply_chat_template(
        [messages],
        tokenize=True,
        add_generation_prompt=messages[-1]["role"] == "user",
        return_dict=True,
        return_tensors="np",
    )


def assert_same(theirs, tokenizer, messages):
    tokens, tiles = ours(tokenizer, messages)
    found = their_inputs(theirs, messages)
    assert np.asarray(found["input_ids"])[0].tolist() == tokens
    for theirs_one, ours_one in zip(found.get("pixel_values", []), tiles, strict=True):
        pixels = np.asarray(theirs_one)[: len(ours_one)].transpose(0, 2, 3, 1)
        # One level of a byte is 0.014 to 0.015 after normalisation, so no pixel differs by one.
        np.testing.assert_allclose(pixels, ours_one, atol=1e-3)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_gives_the_same_tokens_and_pixels(theirs, exported, picture, size):
    content = [
        {"type": "image", "image": picture(*size)},
        {"type": "text", "text": "Hii ni nini?\nni paka?"},
    ]
    assert_same(theirs, exported[1], [{"role": "user", "content": content}])


def test_several_pictures_turns_and_a_system_prompt(theirs, exported, picture):
    messages = [
        {"role": "system", "content": "답은 한국어로."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare"},
                {"type": "image", "image": picture(200, 300)},
                {"type": "text", "text": "with"},
                {"type": "image", "image": picture(500, 100)},
            ],
        },
        {"role": "assistant", "content": "Both are noise."},
        {"role": "user", "content": "  هل أنت متأكد؟\n"},
    ]
    assert_same(theirs, exported[1], messages)
    assert_same(theirs, exported[1], messages[:3])


def test_text_alone(theirs, exported):
    assert_same(theirs, exported[1], [{"role": "user", "content": "สวัสดี"}])


def test_the_folder_is_its_own_source(exported, qwen2_folder, tmp_path):
    """Reading the files gives the same tokenizer, and writing that gives the same files."""
    folder, tokenizer = exported
    again = checkpoints.load_tokenizer(folder)
    assert (again.image_id, again.vocab_size) == (tokenizer.image_id, tokenizer.vocab_size)
    processor.write(tmp_path, CONFIG, again, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        first, second = (json.loads((path / name).read_text()) for path in (folder, tmp_path))
        assert first == second, name


def test_image_marker_of_a_plain_vocabulary_is_pangeas(qwen2_folder, tmp_path):
    """LLaVA's layout has no id of `<image>`, and its training code has none either."""
    shutil.copytree(qwen2_folder, tmp_path, dirs_exist_ok=True)
    llava = {"model_type": "qwen2", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "config.json").write_text(json.dumps(llava))
    assert checkpoints.load_tokenizer(tmp_path).image_id == 151646


def test_image_marker_of_a_plain_vocabulary_is_the_configs(qwen2_folder, tmp_path):
    """The rest of the config may be missing."""
    shutil.copytree(qwen2_folder, tmp_path, dirs_exist_ok=True)
    values = {"model_type": "llava_next", "image_token_index": 151650, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert checkpoints.load_tokenizer(tmp_path).image_id == 151650


def test_sentencepiece_is_copied_and_its_limits_are_told(tmp_path):
    tokenizer = load_tokenizer(emoji.DIRECTORY)
    one_view = PangeaConfig(
        vision=VisionConfig(image_size=48, patch_size=8, width=32, layers=2, heads=2, mlp=8),
        pinpoints=(),
    )
    notes = processor.write(tmp_path, one_view, tokenizer, emoji.DIRECTORY)
    assert load_tokenizer(tmp_path).encode("cat") == tokenizer.encode("cat")
    assert "AutoProcessor cannot be used" in notes[0]
    assert "single view with a newline vector" in notes[1]
    assert not (tmp_path / "tokenizer_config.json").exists()


def test_disagreement_about_the_marker_is_an_error(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text()) | {"image_token_index": 151650}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has <image> at 151646, not at image_id=151650"):
        checkpoints.load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        checkpoints.load_tokenizer(tmp_path)
