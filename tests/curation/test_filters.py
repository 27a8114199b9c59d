"""Filters by rule at their thresholds, pictures of every broken kind, CLIP scores."""

import contextlib
import io
import json
import random

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("imagehash", reason="ImageHash is in requirements-curation.txt")

from pangea_jax.curation import filters, near_duplicates
from pangea_jax.curation.filters import Filters
from pangea_jax.curation.image_text import Pair
from pangea_jax.data import image

from .samples import picture


def pair(**changes):
    plain = {"id": "1", "text": "a temple", "nsfw": "UNLIKELY", "language": "ja", "width": 400}
    return Pair(**(plain | {"height": 300} | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"width": 224, "height": 224}, None),
        ({"width": 223}, "picture is too small"),
        ({"width": 4096, "height": 4096}, None),
        ({"width": 4097, "height": 4096}, "picture is too large"),
        ({"width": 900, "height": 300}, None),
        ({"width": 901, "height": 300}, "aspect ratio"),
        ({"width": 250, "height": 1000}, None),
        ({"width": 250, "height": 1001}, "aspect ratio"),
        ({"text": "12345"}, None),
        ({"text": "1234"}, "text is too short"),
        ({"text": "x" * 5000}, None),
        ({"text": "x" * 5001}, "text is too long"),
        ({"nsfw": "unlikely"}, None),
        ({"nsfw": "UNSURE"}, "NSFW tag"),
        ({"nsfw": ""}, "no NSFW tag"),
        ({"language": "en"}, "language is not wanted"),
        ({"language": "JP"}, None),
        ({"language": ""}, None),
        ({"text": "a BAD—word here"}, "offensive text"),
        ({"text": "a badword here"}, None),
        ({"text": "これは悪口です"}, "offensive text"),
        ({"encoded": picture(size=(300, 200))}, "picture is too small"),
        ({"encoded": b"no picture"}, "picture of no known format"),
    ],
)
def test_thresholds_are_those_of_the_paper(changes, reason):
    filters = Filters(languages=("ja",), blocked=frozenset({"bad word", "悪口"}))
    assert filters.reason(pair(**changes)) == reason


def test_words_of_any_script():
    assert filters.words("Ｔokyo's Skytree, 東京!") == ["tokyo", "s", "skytree", "東", "京"]
    assert filters.words("हिन्दी में, café…") == ["हिन्दी", "में", "café"]
    assert filters.words("¡¿… — ") == []


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_broken_pictures_of_every_format_are_a_reason(kind):
    whole, luck = picture(1, (64, 48), kind), random.Random(kind)
    rules = Filters(min_side=1, languages=None)
    for _ in range(60):
        data = bytearray(whole)
        for place in luck.choices(range(min(len(data), 600)), k=luck.choice([1, 3, 20])):
            data[place] = luck.randrange(256)
        data = bytes(data[: luck.choice([None, luck.randrange(len(data))])])
        reason = rules.reason_of_size(data)
        assert reason is None or reason.startswith("picture") or reason == "aspect ratio"
        with contextlib.suppress(image.ImageError):
            near_duplicates.perceptual_hash(image.preview(data, max_pixels=1 << 20)[0])


def test_clip_scores_are_cosines_of_the_two_towers(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is in requirements-parity.txt")
    transformers = pytest.importorskip("transformers", reason="it is in requirements-parity.txt")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 300}
    config = transformers.CLIPConfig(
        text_config=sizes | ends | {"max_position_embeddings": 16},
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    names = ["<pad>", "<|startoftext|>", "<|endoftext|>", *letters]
    (tmp_path / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)

    pictures = [Image.open(io.BytesIO(picture(seed))).convert("RGB") for seed in range(3)]
    texts = ["a temple", "two boats", "a very long text about everything that there is"]
    scores = filters.ClipScorer(str(tmp_path))(pictures, texts)
    assert scores.shape == (3,) and scores.dtype == np.float32
    for shown, text, score in zip(pictures, texts, scores, strict=True):
        with torch.no_grad():
            pixels = images(shown, return_tensors="pt")
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=16)
            out = model(**pixels, **tokens)
        expected = float((out.image_embeds @ out.text_embeds.T).squeeze())
        assert score == pytest.approx(expected, abs=1e-4)
    assert len({round(float(s), 3) for s in scores}) == 3
