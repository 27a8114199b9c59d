"""Trains the SentencePiece vocabulary of the embedded sample."""

import io
import random
from collections.abc import Collection, Iterator

from pangea_jax import languages
from pangea_jax.data.tokenizer import END_OF_TEXT, IM_END, IM_START, IMAGE
from pangea_jax.sample import questions
from pangea_jax.sample.emoji import Concept

SIZE = 4_500

_TEMPLATE = ("You are a helpful assistant.", "system", "user", "assistant")
# Phrases of thousands of records are repeated, so that few pieces are enough for them.
_REPEAT = 20


def corpus(concepts: Collection[Concept]) -> Iterator[str]:
    """Every name once, and the questions and words of the chat template `_REPEAT` times."""
    for concept in concepts:
        yield from concept.names.values()
    phrases = list(_TEMPLATE)
    for language in languages.EMOJI:
        phrases += questions.IMAGE[language]
        for phrasing in questions.TEXT[language]:
            phrases += [part for part in phrasing.split("{name}") if part]
    # A candidate piece is a repeated string with different continuations. In a fixed order each
    # phrase would always have the same continuation and would never be a candidate.
    order = random.Random(0)
    for _ in range(_REPEAT):
        order.shuffle(phrases)
        yield from phrases


def train(concepts: Collection[Concept], size: int = SIZE) -> bytes:
    """A serialised SentencePiece unigram model of `size` pieces. The result is deterministic.

    Pieces may contain spaces, so a whole question can be one piece. Rare characters are written as
    bytes, so every text can be encoded.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(concepts),
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
        user_defined_symbols=["\n"],
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
