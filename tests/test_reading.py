"""Training and answering read a conversation equally: same tokens, places and tiles for all configs and policies."""

import dataclasses
import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from launch import common
from pangea_jax import checkpoints, experiment
from pangea_jax.data.build.write_store import Picture, write_store
from pangea_jax.data.pipeline import render_example
from pangea_jax.data.reader import REFERENCE, ReadingPolicy
from pangea_jax.data.record import Conversation, Turn
from pangea_jax.data.store import RecordStore
from pangea_jax.experiment import Experiment
from pangea_jax.generate.engine import Engine
from pangea_jax.model import Pangea
from pangea_jax.typed_config import build
from tests.data import test_golden as golden

CONFIGS = [
    "sample",
    "rehearsal",
    "finetune",
    "pangea_7b_finetune",
    "pangea_7b_pretrain",
    "pangea_0_5b_finetune",
    "pangea_0_5b_pretrain",
    *(f"ablate_{name}" for name in ("en_ratio", "language_popularity", "num_samples")),
    "ablate_num_languages",
    *(f"ablate_{name}" for name in ("vision_tower", "loss_mask", "anyres", "data_origin")),
]
ARGUMENTS = {"finetune": "model=sample,data=emoji"}
POLICIES = {
    "reference": REFERENCE,
    "background": ReadingPolicy(background=(255, 255, 255)),
    "rounding": ReadingPolicy(rounding="transformers"),
    "padded": ReadingPolicy(multi_image="padded"),
    "marker_first": ReadingPolicy(marker_first=True),
    "upright": ReadingPolicy(orientation="upright"),
}
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def turned(image):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    return encoded(image, "JPEG", exif=exif)


PICTURES = {
    "made/clear": (encoded(Image.new("RGBA", (90, 60), (*RED, 0))), (90, 60)),
    "made/turned": (turned(noise(400, 150)), (400, 150)),
    "made/wide": (encoded(noise(701, 233)), (701, 233)),
    "made/small": (encoded(noise(31, 47)), (31, 47)),
}


def conversation(name, *turns, images=()):
    roles = ("user", "assistant") * len(turns)
    turns = tuple(Turn(role, text) for role, text in zip(roles, turns, strict=False))
    return Conversation(name, "made", "en", "", images, turns)


CONVERSATIONS = [
    conversation("text", "How are you?", "Well.", "Good.", "Yes."),
    *(conversation(key, "<image>\nWhat is it?", "A noise.", images=(key,)) for key in PICTURES),
    conversation("last", "What is in this picture? <image>", "Noise.", images=("made/wide",)),
    conversation("two", "<image> <image>\nAlike?", "No.", images=("made/wide", "made/small")),
    conversation(
        "later", "Here: <image>", "Ah.", "And <image>?", "Oh.", images=("made/clear", "made/turned")
    ),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    write_store(
        directory,
        name="made",
        build="python launch/build_data.py made",
        records={"train": ((c, {}) for c in CONVERSATIONS)},
        images={"made": iter(Picture(k, data, *size) for k, (data, size) in PICTURES.items())},
        columns=(),
    )
    return RecordStore(directory)


def answering(exp, tokenizer, **changes):
    """An engine with the experiment's policy and picture geometry, and with small random layers."""
    vision = dataclasses.replace(exp.model.vision, width=16, layers=2, heads=2, mlp=16)
    language = dataclasses.replace(
        exp.model.language,
        vocab_size=tokenizer.vocab_size,
        width=16,
        layers=1,
        heads=1,
        kv_heads=1,
        head_width=16,
        mlp=16,
    )
    model = dataclasses.replace(exp.model, vision=vision, language=language, **changes)
    return Engine(Pangea(model, rngs=nnx.Rngs(0)), tokenizer, policy=exp.reading)


def as_messages(record, picture=lambda key: PICTURES[key][0]):
    """The record as messages for the engine."""
    left, messages = list(record.images), []
    for turn in record.turns:
        message = {"role": turn.role, "content": turn.text}
        if count := turn.text.count("<image>"):
            message["images"] = [picture(key) for key in left[:count]]
            left = left[count:]
        messages.append(message)
    return messages


def assert_alike(exp, store, tokenizer, records=None, **sources):
    engine, reader = answering(exp, tokenizer), experiment.make_reader(exp, store, tokenizer)
    roomy = dataclasses.replace(exp.pipeline, row_tokens=16_384, row_tiles=20, max_targets=None)
    for record in CONVERSATIONS if records is None else records:
        trained = render_example(record, None, reader, roomy)
        asked = engine.read(as_messages(record, **sources))
        for name in ("tokens", "image_index", "tiles"):
            np.testing.assert_array_equal(getattr(trained, name), getattr(asked, name), record.id)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_trains_as_it_answers(name, store, emoji_tokenizer):
    arguments = () if name not in ARGUMENTS else (ARGUMENTS[name],)
    exp = build(Experiment, importlib.import_module(f"configs.{name}").get_config(*arguments))
    assert_alike(exp, store, emoji_tokenizer)


def test_every_config_is_here():
    files = Path(common.__file__).parents[1].glob("configs/*.py")
    others = {"__init__", "arguments", "scales", "sample_stage1", "sample_tower"}
    assert {file.stem for file in files} - others == set(CONFIGS)


@pytest.fixture
def pangea():
    from configs import pangea_7b_finetune

    return build(Experiment, pangea_7b_finetune.get_config())


@pytest.mark.parametrize("one_view", [False, True], ids=["anyres", "llava-1.5"])
@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_trains_as_it_answers(policy, one_view, store, emoji_tokenizer, pangea):
    exp = dataclasses.replace(pangea, reading=POLICIES[policy])
    if one_view:
        model = dataclasses.replace(exp.model, pinpoints=(), newline=False)
        exp = dataclasses.replace(exp, model=model)
    assert_alike(exp, store, emoji_tokenizer)


@golden.pytestmark
def test_every_record_of_the_official_sample_is_read_alike(pangea):
    tokenizer = golden.load_tokenizer(golden.QWEN3, image_id=151_669)
    released = json.loads((golden.SAMPLE / "PangeaIns.json").read_text(encoding="utf-8"))
    records = [Conversation.from_pangeains(one, default_language="en") for one in released]
    assert_alike(pangea, golden.Folder(), tokenizer, records, picture=golden.SAMPLE.joinpath)


def test_stored_features_take_the_places_of_tiles(store, emoji_tokenizer):
    """The sample trains on features of a frozen tower; when it answers, the tower runs."""
    from configs import sample

    exp = build(Experiment, sample.get_config())
    engine = answering(exp, emoji_tokenizer)
    vision = exp.model.vision
    features = {key: np.zeros((2, vision.patches, 8), np.float32) for key in PICTURES}
    reader = experiment.make_reader(exp, store, emoji_tokenizer, features)
    roomy = dataclasses.replace(exp.pipeline, row_tokens=4096, row_tiles=4, max_targets=None)
    for record in CONVERSATIONS:
        trained = render_example(record, np.random.default_rng(0), reader, roomy)
        asked = engine.read(as_messages(record))
        np.testing.assert_array_equal(trained.tokens, asked.tokens)
        np.testing.assert_array_equal(trained.image_index, asked.image_index)
        assert len(trained.features) == len(asked.tiles)


def read(exp, record, tokenizer):
    (found,) = [c for c in CONVERSATIONS if c.id == record]
    return answering(exp, tokenizer).read(as_messages(found))


def test_what_a_policy_means(emoji_tokenizer, pangea):
    """Cases that training and answering read differently in the past."""
    colours = {}
    for name in ("reference", "background"):
        exp = dataclasses.replace(pangea, reading=POLICIES[name])
        colours[name] = tuple(read(exp, "made/clear", emoji_tokenizer).tiles[0, 168, 168])
    assert colours == {"reference": RED, "background": WHITE}

    model = dataclasses.replace(pangea.model, pinpoints=(), newline=False)
    places = read(
        dataclasses.replace(pangea, model=model), "made/wide", emoji_tokenizer
    ).image_index
    assert np.count_nonzero(places >= 0) == 24**2

    tiles = {name: read(dataclasses.replace(pangea, reading=POLICIES[name]), "two", emoji_tokenizer)
             for name in ("reference", "padded")}  # fmt: skip
    assert {name: len(prompt.tiles) for name, prompt in tiles.items()} == {
        "reference": 4 + 3,
        "padded": 2,
    }


def test_pangea_trains_as_the_golden_records_are_read(pangea):
    assert pangea.reading == golden.POLICY


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_saved_with_a_model(policy, tmp_path, pangea):
    exp = dataclasses.replace(pangea, reading=POLICIES[policy])
    common.claim_workdir(tmp_path / "run", exp)
    assert checkpoints.load_policy(tmp_path / "run") == exp.reading
    exp.reading.save(tmp_path)
    assert checkpoints.load_policy(tmp_path) == exp.reading


def test_an_imported_model_reads_as_the_reference(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava_next"}')
    assert checkpoints.load_policy(tmp_path) == ReadingPolicy()


def test_a_run_without_a_policy_is_told_of(tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"model": {}}')
    with caplog.at_level("WARNING", logger="absl"):
        assert checkpoints.load_policy(tmp_path) == ReadingPolicy()
    assert "config.json has no field 'reading'" in caplog.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "reading.json: not JSON"),
        ("[]", "expected an object"),
        ('{"colour": 1}', "unknown field 'colour'; known are background"),
        ('{"rounding": "up"}', "reading.rounding 'up' is not one of"),
        ('{"background": [1, 2]}', r"reading.background is \(1, 2\); expected"),
    ],
)
def test_a_damaged_policy_is_refused(content, says, tmp_path):
    (tmp_path / "reading.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        checkpoints.load_policy(tmp_path)
