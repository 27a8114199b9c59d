"""Trains the SentencePiece vocabulary of the embedded sample."""

import dataclasses
import io
import random
from collections import Counter
from collections.abc import Collection, Iterator

from pangea_jax import languages
from pangea_jax.data.chat import SYSTEM_PROMPT
from pangea_jax.data.tokenizer import END_OF_TEXT, IM_END, IM_START, IMAGE
from pangea_jax.sample.emoji import Concept
from pangea_jax.sample.questions import PHRASES, Phrases
from pangea_jax.sample.turns import LETTERS

SIZE = 5_200

# Symbols are never joined with what follows them. So each of these is one token in every text, and an
# answer is encoded the same after its header as without it. An option's newline is apart: joined with
# it, an answer "A. cat" would take the newline of its header.
_SYMBOLS = (
    "\n",
    f"system\n{SYSTEM_PROMPT}",
    "user\n",
    "assistant\n",
    *(f"{letter}. " for letter in LETTERS),
)
# How often a phrase (in thousands of records), a name (the usual answer) and a keyword count.
_COUNTS = (20, 2, 1)
# In the default languages they count more. Most of their names and phrases become one piece, as a large
# vocabulary has whole words of its main languages; names of the others are spelled in several pieces.
DEFAULT_LANGUAGES = frozenset(("ar", "en", "es", "hi", "ko", "ru", "sw", "zh"))
_DEFAULT_COUNTS = (400, 40, 4)
# The training starts with this number of candidate pieces; a million, as usual, take ten times as long.
_CANDIDATES = 50_000


def corpus(concepts: Collection[Concept]) -> Iterator[str]:
    """Every name, keyword and phrase with its count, separated by a tab; names and phrases twice."""
    counts: Counter[str] = Counter()
    words = {word for c in concepts for some in c.keywords.values() for word in some}
    words -= {name for c in concepts for name in c.names.values()}
    for language in languages.EMOJI:
        phrase, name, keyword = _DEFAULT_COUNTS if language in DEFAULT_LANGUAGES else _COUNTS
        for concept in concepts:
            counts[concept.names[language]] += name
            counts.update(dict.fromkeys(concept.keywords[language], keyword))
        counts.update(dict.fromkeys(_parts(PHRASES[language]), phrase))
    # A candidate piece is a repeated string with different continuations. In a fixed order each
    # text would always have the same continuation and would never be a candidate. Keywords stand in
    # one order only, because as candidates they would push out pieces of names.
    order, texts = random.Random(0), list(counts)
    order.shuffle(texts)
    yield from (f"{text}\t{counts[text]}" for text in texts)
    order.shuffle(texts)
    yield from (f"{text}\t{counts[text]}" for text in texts if text not in words)


def _parts(phrases: Phrases) -> list[str]:
    """The texts of a language's phrases, without names."""
    texts = []
    for field in dataclasses.fields(phrases):
        value = getattr(phrases, field.name)
        texts += [value] if isinstance(value, str) else value
    return [part for text in texts for part in text.split("{name}") if part]


def train(concepts: Collection[Concept], size: int = SIZE) -> bytes:
    """A serialised SentencePiece unigram model of `size` pieces. The result is deterministic.

    Pieces may contain spaces, so a whole question can be one piece. Rare characters are written as
    bytes, so every text can be encoded.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(concepts),
        input_format="tsv",
        seed_sentencepiece_size=_CANDIDATES,
        model_writer=model,
        vocab_size=size,
        model_type="unigram",
        character_coverage=0.998,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_by_number=False,
        max_sentencepiece_length=64,
        # SentencePiece's blank is `▁`.
        user_defined_symbols=[symbol.replace(" ", "▁") for symbol in _SYMBOLS],
        control_symbols=[END_OF_TEXT, IM_START, IM_END, IMAGE],
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        # With several threads, the sums of the EM steps depend on the order of the threads.
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
