import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from configs import sample
from pangea_jax import languages
from pangea_jax.data.chat import SYSTEM_PROMPT
from pangea_jax.data.tokenizer import (
    NoImageToken,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerJson,
    load_tokenizer,
)
from pangea_jax.sample import emoji, vocabulary
from pangea_jax.sample.questions import PHRASES

QWEN3 = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizer_qwen3"
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


def small_json(path: Path, image: str | None) -> Path:
    """A small byte-level BPE like Qwen's; `image` says how the file stores `<image>`."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    model.train_from_iterator(["a cat and a hat on a mat"] * 3, trainer)
    model.add_special_tokens(list(MARKERS[:3]))
    if image == "ordinary":
        model.add_tokens(["<image>"])
    elif image == "special":
        model.add_special_tokens(["<image>"])
    model.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.fixture(
    scope="module", params=["sentencepiece", "json", "json, image ordinary", "json, qwen3"]
)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(emoji.DIRECTORY)
    if request.param == "json, qwen3":
        if not (QWEN3 / "tokenizer.json").is_file():
            pytest.skip(f"no Qwen3 tokenizer at {QWEN3}")
        return load_tokenizer(QWEN3, image_id=151_669)
    image = "ordinary" if "ordinary" in request.param else "special"
    return load_tokenizer(small_json(tmp_path_factory.mktemp("json"), image))


def texts(language):
    yield from PHRASES[language].name
    yield from PHRASES[language].translate
    yield from (concept.names[language] for concept in emoji.load_concepts()[::29])


@pytest.mark.parametrize("language", languages.EMOJI)
def test_every_language_round_trips(tokenizer, language):
    for text in texts(language):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.piece, ids)).decode() == text
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


@pytest.mark.parametrize("text", ["", " ", "  two  blanks ", "\n\n", "a\nb\t", "𓂀 🐈‍⬛ ᚠ", "\x00x"])
def test_odd_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.piece, ids)).decode() == text


@pytest.mark.parametrize("marker", MARKERS)
def test_markers_in_text_stay_text(tokenizer, marker):
    special = {tokenizer.pad_id, tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.image_id}
    ids = tokenizer.encode(f"a {marker}\n{marker}b")
    assert not special & set(ids)
    assert tokenizer.decode(ids) == f"a {marker}\n{marker}b"


def test_special_tokens_are_skipped_or_shown(tokenizer):
    word = tokenizer.encode("cat")
    ids = [tokenizer.im_start_id, *word, tokenizer.image_id, *word, tokenizer.im_end_id]
    ids.append(tokenizer.pad_id)
    assert tokenizer.decode(ids) == "catcat"
    shown = "<|im_start|>cat<image>cat<|im_end|><|endoftext|>"
    assert tokenizer.decode(ids, skip_special=False) == shown
    assert b"".join(map(tokenizer.piece, ids)).decode() == shown


def test_special_ids_are_distinct_and_newline_decodes(tokenizer):
    special = {tokenizer.pad_id, tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.image_id}
    assert len(special) == 4
    assert tokenizer.decode(tokenizer.newline_ids) == "\n"
    assert isinstance(tokenizer, Tokenizer)


def test_qwen3_ids_are_the_published_ones():
    if not (QWEN3 / "tokenizer.json").is_file():
        pytest.skip(f"no Qwen3 tokenizer at {QWEN3}")
    tokenizer = load_tokenizer(QWEN3, image_id=151_669)
    ids = (tokenizer.pad_id, tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.newline_ids)
    assert ids == (151_643, 151_644, 151_645, (198,))


# The sample has no Sundanese.
SUNDANESE = ("Naon ieu téh?", "Ieu téh ucing keur saré dina korsi.", "Sabaraha hargana, 12.500?")


@pytest.mark.parametrize("language", languages.PANGEAINS)
def test_ids_equal_those_of_transformers(qwen2_folder, references, language):
    """Compares vocab.json, and the tokenizer.json made from it, with Qwen2Tokenizer."""
    tokenizer, reference, saved = references
    of_language = SUNDANESE if language == "su" else tuple(texts(language))
    name = languages.get(language).native_name
    for text in (
        *of_language,
        name,
        f"1. {name}\n\n  {name}: 3,50 % ",
        unicodedata.normalize("NFD", name),
    ):
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == expected
        assert saved(text, add_special_tokens=False)["input_ids"] == expected
        assert tokenizer.decode(expected) == reference.decode(expected)


@pytest.fixture(scope="module")
def references(qwen2_folder, tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="is in requirements-parity.txt")
    tokenizer = load_tokenizer(qwen2_folder, image_id=151_646)
    file = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    tokenizer.save(file)
    merges = (qwen2_folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    reference = transformers.Qwen2Tokenizer(
        vocab=json.loads((qwen2_folder / "vocab.json").read_text("utf-8")),
        merges=[tuple(merge.split(" ")) for merge in merges],
    )
    return tokenizer, reference, transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))


def test_the_older_form_is_the_same_vocabulary(qwen2_folder):
    tokenizer = load_tokenizer(qwen2_folder, image_id=151_646)
    ids = (tokenizer.pad_id, tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.newline_ids)
    assert ids == (151_643, 151_644, 151_645, (198,))
    assert (tokenizer.image_id, tokenizer.vocab_size) == (151_646, 151_647)
    with pytest.raises(NoImageToken):
        load_tokenizer(qwen2_folder)


def test_saving_puts_the_image_marker_where_it_belongs(tmp_path):
    path = small_json(tmp_path, image=None)
    size = TokenizerJson(path, image_id=999).vocab_size
    assert size == 1_000
    with pytest.raises(ValueError, match="next free id is 271, not 999"):
        TokenizerJson(path, image_id=999).save(tmp_path / "saved.json")
    TokenizerJson(path, image_id=271).save(tmp_path / "saved.json")
    assert TokenizerJson(tmp_path / "saved.json").image_id == 271


def test_image_id_must_be_known_and_agree(tmp_path):
    path = small_json(tmp_path, image=None)
    with pytest.raises(NoImageToken, match="has no token <image>; pass image_id"):
        TokenizerJson(path)
    assert TokenizerJson(path, image_id=999).vocab_size == 1_000
    path = small_json(tmp_path, image="special")
    with pytest.raises(ValueError, match="not at image_id=7"):
        TokenizerJson(path, image_id=7)


def test_files_that_are_not_tokenizers_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for .*tokenizer.json, .*tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def sample_tokenizer():
    return SentencePieceTokenizer(emoji.DIRECTORY / emoji.TOKENIZER)


def test_sample_vocabulary_is_economical(sample_tokenizer):
    def mean(texts):
        return np.mean([len(sample_tokenizer.encode(text)) for text in texts])

    concepts = emoji.load_concepts()
    names = {code: mean(c.names[code] for c in concepts) for code in languages.EMOJI}
    assert np.mean([names[code] for code in sample.LANGUAGES]) < 1.1
    assert np.mean(list(names.values())) < 5.0
    assert mean(part for code in sample.LANGUAGES for part in PHRASES[code].name) < 1.5
    assert mean(part for code in languages.EMOJI for part in PHRASES[code].name) < 7
    assert sample_tokenizer.vocab_size == vocabulary.SIZE


@pytest.mark.parametrize("answer", ["cat", "B", "A. cat", "", " x", "assistant", "香蕉", "user"])
def test_headers_and_options_are_single_tokens_whatever_follows(sample_tokenizer, answer):
    encode = sample_tokenizer.encode
    for text in (f"system\n{SYSTEM_PROMPT}", "user\n", "assistant\n", "A. ", "D. "):
        assert len(encode(text)) == 1, text
        assert encode(text + answer) == encode(text) + encode(answer)
        assert sample_tokenizer.decode(encode(text + answer)) == text + answer


def test_training_the_vocabulary_is_reproducible():
    concepts = emoji.load_concepts()
    model = vocabulary.train(concepts)
    assert model == vocabulary.train(concepts)
    # The bytes may differ between builds of SentencePiece, but almost no piece does.
    import sentencepiece

    def pieces(proto):
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        return {processor.id_to_piece(id) for id in range(processor.get_piece_size())}

    shipped = pieces((emoji.DIRECTORY / emoji.TOKENIZER).read_bytes())
    assert len(shipped) == vocabulary.SIZE
    assert len(shipped & pieces(model)) >= 0.99 * vocabulary.SIZE
