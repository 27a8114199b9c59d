"""The engine gives the same tokens as the reference."""

import base64
import dataclasses
import io
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pangea_jax
from pangea_jax import anyres, checkpoints, sharding
from pangea_jax.data.image import ImageError
from pangea_jax.data.reader import ReadingPolicy
from pangea_jax.generate import engine as engine_module
from pangea_jax.generate.engine import Engine, bucket
from pangea_jax.model.vision import normalize
from pangea_jax.sample import emoji
from pangea_jax.sample.sample_store import SampleStore

NEW, IMAGE_ID, VOCABULARY = 64, 96, 97


class Characters:
    """A vocabulary of `VOCABULARY` ids; each id is one character."""

    im_start_id, im_end_id, pad_id, image_id = 93, 94, 95, IMAGE_ID
    vocab_size, newline_ids = VOCABULARY, (10,)

    def encode(self, text):
        return [10 if c == "\n" else ord(c) % 90 for c in text]

    def decode(self, ids, skip_special=True):
        return "".join(chr(0x4E00 + i) for i in ids)


@pytest.fixture(scope="module")
def reference(make_reference):
    return make_reference("qwen2", False)


@pytest.fixture(scope="module")
def engine(reference):
    """Has the reference's weights, and a tokenizer with as many ids."""
    config = checkpoints.config_from_folder(reference.folder)
    config = dataclasses.replace(config, dtype="float32")
    model = checkpoints.load_model(reference.folder, config)
    model.language.unstack()
    return Engine(model, Characters(), policy=ReadingPolicy(rounding="transformers"))


@pytest.fixture(scope="module")
def sample():
    return pangea_jax.load("sample")


def user(*parts):
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def conversations(picture):
    return [
        [user(picture(300, 200), "What is this?")],
        [user("Hello")],
        [user("Which ", picture(40, 120), "or", picture(30, 31), "is larger?")],
        [
            {"role": "system", "content": "Be brief."},
            user(picture(90, 90), "And this?"),
            {"role": "assistant", "content": "A thing."},
            user("Sure?"),
        ],
        [user("A question that is rather longer than the others of this batch " * 3)],
    ]


def test_greedy_tokens_equal_generate(engine, reference, conversations):
    """A padded batch, some rows with pictures, compared with the reference on each row alone."""
    import torch

    ours = engine.generate(conversations, NEW, stop=[])
    for conversation, text in zip(conversations, ours, strict=True):
        prompt = engine._prompt(conversation, NEW, "")
        inputs = {"input_ids": torch.tensor(prompt.tokens[None])}
        pictures = [
            part["image"]
            for message in conversation
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]
        if pictures:
            pixels = np.asarray(normalize(jnp.asarray(prompt.tiles))).transpose(0, 3, 1, 2)
            counts = [
                anyres.layout(p.size, engine.config.pinpoints, 28, 4, "transformers").num_tiles
                for p in pictures
            ]
            split = np.split(pixels, np.cumsum(counts)[:-1])
            inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(tiles) for tiles in split], batch_first=True
            )
            inputs["image_sizes"] = torch.tensor([p.size[::-1] for p in pictures])
        with torch.no_grad():
            theirs = reference.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert text == engine.tokenizer.decode(theirs[0, len(prompt.tokens) :].tolist())
    assert len({character for text in ours for character in text}) > 20


def test_stop_ids_end_an_answer(engine, conversations):
    free = engine.generate(conversations, 16, stop=[])
    first, second = (ord(free[row][place]) - 0x4E00 for row, place in ((0, 5), (1, 2)))
    stopped = engine.generate(conversations, 16, stop=[first, second])
    ends = {chr(0x4E00 + first), chr(0x4E00 + second)}
    for text, whole in zip(stopped, free, strict=True):
        assert text == "".join(itertools.takewhile(lambda c: c not in ends, whole))
    assert len(stopped[0]) <= 5


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "top_k": 40, "seed": 7}])
def test_batches_and_streams_give_the_same_answers(engine, conversations, settings):
    expected = engine.generate(conversations, 20, **settings)
    assert engine.generate(conversations, 20, batch_size=2, **settings) == expected
    for conversation, text in zip(conversations[:3], expected, strict=False):
        pieces = list(engine.stream(conversation, 20, **settings))
        assert "".join(pieces) == text
        assert all(pieces)


def test_an_answer_of_one_token(engine, conversations):
    longer = engine.generate(conversations[:2], 5, stop=[])
    assert engine.generate(conversations[:2], 1, stop=[]) == [text[0] for text in longer]
    assert list(engine.stream(conversations[0], 1, stop=[])) == [longer[0][0]]


def test_seeds_differ(engine, conversations):
    same = [conversations[1]] * 3
    a, b, c = engine.generate(same, 16, temperature=1.0, seed=[1, 2, 1])
    assert a == c != b


def test_few_programs_are_compiled(engine):
    """One program per width serves all lengths, settings and stop ids."""
    programs = [p.args[0] for p in (engine._programs.begin, engine._programs.advance)]
    before = [program._cache_size() for program in programs]
    widths = set()
    for i, length in enumerate((1, 20, 40, 60, 70, 100, 120)):
        asked = [[user("x" * length)]] * (1 + i % 2)
        widths.add(bucket(len(engine._prompt(asked[0], 1, "").tokens)))
        engine.generate(asked, 1 + 9 * i, top_p=0.5)
        engine.generate(asked[:1], 9, temperature=i / 10, seed=i, stop=[1, 2 + i])
    assert len(widths) <= 3
    # For reading: one prompt, and the largest part of a batch. For decoding: one row and two.
    for program, size in zip(programs, before, strict=True):
        assert program._cache_size() - size <= 2 * len(widths)


def test_buckets():
    sizes = np.arange(1, 32_769)
    widths = np.array([bucket(size) for size in sizes.tolist()])
    assert (widths >= sizes).all()
    assert (widths % 64 == 0).all()
    assert ((widths - sizes) < np.maximum(64, sizes / 4 + 1)).all()
    assert len(set(widths)) <= 36


def test_text_is_streamed_in_whole_characters(engine):
    """Each token is one byte, so a character beyond ASCII has several tokens."""

    class Bytes:
        def decode(self, ids, skip_special=True):
            return bytes(ids).decode("utf-8", errors="replace")

    text = "naïve 日本語 🐈‍⬛ हिन्दी"
    pieces = list(engine_module._pieces(iter([*text.encode(), 255]), Bytes(), [255]))
    assert pieces == list(text)
    # An incomplete character at the end comes at the end.
    broken = list(engine_module._pieces(iter([*b"ab", 0xE6, 0x97]), Bytes(), [255]))
    assert broken == ["a", "b", "\ufffd"]
    between = list(engine_module._pieces(iter([0xE6, *b"ab"]), Bytes(), [255]))
    assert between == ["\ufffda", "b"]


def test_streams_of_the_sample_are_whole_text(sample):
    messages = [user(SampleStore().image("twemoji/1f408"), "这是什么？")]
    for seed in range(4):
        pieces = list(sample.stream(messages, 24, temperature=2.0, seed=seed))
        (whole,) = sample.generate([messages], 24, temperature=2.0, seed=seed)
        assert "".join(pieces) == whole
        # Letters that are not in the sample's vocabulary become tokens of single bytes.
        if "\ufffd" not in whole:
            assert not any("\ufffd" in piece for piece in pieces)


def test_all_forms_of_a_picture_read_the_same(engine, picture, tmp_path):
    image = picture(120, 80)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(stream.getvalue())
    text = base64.b64encode(stream.getvalue()).decode()
    url = f"data:image/png;base64,{text}"
    forms = [
        {"type": "image", "image": image},
        {"type": "image", "image": stream.getvalue()},
        {"type": "image", "image": str(path)},
        {"type": "image", "path": path},
        {"type": "image", "base64": text},
        {"type": "image", "image": url},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
    ]
    question = {"type": "text", "text": "Which?"}
    prompts = [
        engine._prompt([{"role": "user", "content": [form, question]}], 1, "") for form in forms
    ]
    # Without a marker in the text, one is put first, which gives the same prompt.
    marked = [{"role": "user", "content": "Which?", "images": [image]}]
    prompts.append(engine._prompt(marked, 1, ""))
    for prompt in prompts[1:]:
        for name in ("tokens", "image_index", "tiles"):
            np.testing.assert_array_equal(getattr(prompt, name), getattr(prompts[0], name))


@pytest.mark.parametrize(
    ("size", "message"),
    [((20_000, 20_000), "over the limit of"), ((0, 5), "0 x 5 has no pixels")],
)
def test_pictures_that_cannot_be_used_are_named(engine, picture, tmp_path, size, message):
    huge = Image.new("1", size)
    fine = user(picture(30, 30), "x")
    with pytest.raises(ImageError, match=message) as error:
        engine.generate([[fine], [user(picture(9, 9), "x", huge)]])
    assert "conversations[1], image 2" in str(error.value)
    if min(size):
        path = tmp_path / "huge.png"
        huge.save(path)
        with pytest.raises(ImageError, match=message) as error:
            engine.stream([user(path)])
        assert str(path) in str(error.value)


def test_one_pixel_is_a_picture(engine):
    assert len(engine.generate([[user(Image.new("RGB", (1, 1)), "x")]], 4, stop=[])[0]) == 4


def test_broken_pictures_are_named(engine, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ImageError, match=r"broken\.png"):
        engine.generate([[user(path)]])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        engine.generate([[user("x", tmp_path / "nowhere.png")]])


def test_a_context_overflow_is_refused_before_anything_runs(engine, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr(engine._programs, "begin", never)
    fits, long = [user("x" * 3_900)], [user("x" * 4_050)]
    with pytest.raises(ValueError, match=r"conversations\[1\].*64 new ones.*context of 4096"):
        engine.generate([fits, long])
    with pytest.raises(ValueError, match=r"messages.*200 new ones"):
        engine.stream(fits, 200)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"seed": [1, 2, 3]}, "seed: 3 values for 1 rows"),
        ({"stop": "."}, "stop '.' is not a list of token ids"),
        ({"stop": [2**40]}, "is not a list of token ids"),
        ({"stop": [-(2**31) - 1]}, "is not a list of token ids"),
        ({"stop": [10**5000]}, "is not a list of token ids"),
        ({"stop": [True]}, "is not a list of token ids"),
        ({"stop": [None]}, "is not a list of token ids"),
        ({"stop": 5}, "stop 5 is not a list of token ids"),
        ({"stop": {1: 2}}, "is not a list of token ids"),
        ({"stop": b"ab"}, "is not a list of token ids"),
        ({"stop_strings": 5}, "stop_strings 5 is not a list of texts"),
        ({"stop_strings": [5]}, "is not a list of texts"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 2**70}, "exceed the model's context"),
        ({"batch_size": None}, "batch_size must be a whole number"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"seed": 2**70}, "seed"),
        ({"seed": None}, "seed"),
        ({"top_k": 2**40}, "top_k"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": [[0.0]]}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_bad_settings(engine, settings, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([[user("x")]], **settings)


@pytest.mark.parametrize(("new", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError)])
def test_a_stream_refuses_its_length_at_once(engine, new, error):
    with pytest.raises(error):
        engine.stream([user("x")], new)


@pytest.mark.parametrize("asked", [5, None, b"x", 1.5, {"role": "user"}])
def test_what_is_no_list_of_conversations(engine, asked):
    with pytest.raises(ValueError, match="conversations is one"):
        engine.generate(asked)


@pytest.mark.parametrize("texts", ["abc", 5, [5], None, ["a", b"b"], ["\ud800"]])
def test_continuations_that_are_no_texts(engine, texts):
    with pytest.raises(ValueError, match="continuations"):
        engine.candidates([user("x")], texts)


def test_numbers_of_numpy_are_numbers(engine):
    asked = [user("x")]
    (expected,) = engine.generate([asked], 3, stop=[])
    assert engine.generate([asked], np.int64(3), stop=[]) == [expected]
    assert "".join(engine.stream(asked, np.int64(3), stop=[])) == expected


def test_other_types_than_conversations_are_refused(engine):
    """For example, a message in place of a conversation, or a conversation in place of a list."""
    message = user("What is this?")
    for conversations in ([message], [None], [3]):
        with pytest.raises(ValueError, match=r"conversations\[0\] is not a list of messages: "):
            engine.generate(conversations)
    for conversations in (message, "What is this?"):
        with pytest.raises(ValueError, match=r"conversations is one (dict|str); give a list"):
            engine.generate(conversations)
    for conversation in (message, [[message]]):
        with pytest.raises(ValueError, match="messages is not a list of messages: "):
            engine.logits(conversation)
        with pytest.raises(ValueError, match="messages is not a list of messages: "):
            engine.stream(conversation)


def test_a_saved_policy_decides_what_lies_under_transparency(
    make_random_model, emoji_tokenizer, tmp_path
):
    """In training, the sample's drawings are on white; the colours of transparent pixels are not seen."""
    model, tokens = make_random_model(), emoji_tokenizer
    ids = checkpoints.SpecialTokens.of(tokens)
    checkpoints.save(model, model.config, tmp_path, tokens=ids)
    shutil.copy(emoji.DIRECTORY / emoji.TOKENIZER, tmp_path)
    ReadingPolicy(background=(255, 255, 255)).save(tmp_path)
    clear = [user(Image.new("RGBA", (64, 64)))]
    for name in ("sample", tmp_path):
        assert (pangea_jax.load(name).read(clear).tiles == 255).all()
    assert (pangea_jax.load(tmp_path, background=None).read(clear).tiles == 0).all()
    (tmp_path / "reading.json").unlink()
    assert (pangea_jax.load(tmp_path).read(clear).tiles == 0).all()


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d"])
def test_broken_unicode_is_refused_by_place(sample, text):
    message = {"role": "user", "content": text}
    for conversation in (text, [message], [{"role": "system", "content": text}, user("x")]):
        with pytest.raises(
            ValueError, match=r"conversations\[1\]: a text is not Unicode .*position"
        ):
            sample.generate([[user("x")], conversation])


def test_no_conversations(engine):
    assert engine.generate([]) == []


def test_a_folder_loads_over_a_mesh(sample):
    """Logits and answers on eight devices equal those on one."""
    mesh = sharding.make_mesh(2, 4, 1)
    spread = pangea_jax.load("sample", mesh=mesh)
    kernels = [x for x in jax.tree.leaves(spread._programs.params) if x.ndim == 4]
    assert all(len(x.sharding.device_set) == 8 for x in kernels)
    assert any(not x.sharding.is_fully_replicated for x in kernels)
    messages = [user(SampleStore().image("twemoji/1f408"), "What is this?")]
    np.testing.assert_allclose(spread.logits(messages), sample.logits(messages), atol=1e-4)
    asked = [messages, [user("What?")], messages]
    assert spread.generate(asked, 8) == sample.generate(asked, 8)
    assert "".join(spread.stream(messages, 8)) == sample.generate([messages], 8)[0]


def test_dtypes():
    engine = pangea_jax.load("sample", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(engine._programs.params)} == {jnp.dtype("bfloat16")}
    messages = [user(SampleStore().image("twemoji/1f98b"), "What is this?")]
    assert engine.generate([messages]) == ["butterfly"]
    with pytest.raises(ValueError, match="dtype int8 is not float32, bfloat16 or float16"):
        pangea_jax.load("sample", dtype="int8")
