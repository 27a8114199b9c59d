"""One interface for two kinds of tokenizers: SentencePiece models and Hugging Face's tokenizer.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from pangea_jax.work import paths
from pangea_jax.work.untrusted import parse_json

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
IMAGE = "<image>"
# The files of a tokenizer in a folder; the first one that is there is read.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


# Qwen2 splits a text into these words; BPE merges do not cross their borders.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Byte-level BPE writes each byte as a letter: printable ones as themselves, the others from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(0x100) if byte not in _PRINTABLE)
_BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF_LETTER |= {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}


class NoImageToken(ValueError):
    """The vocabulary has no `<image>` and no `image_id` was given."""


@runtime_checkable
class Tokenizer(Protocol):
    """The interface that the chat template, the data pipeline and decoding use.

    `encode` takes plain text. It encodes a marker such as <|im_end|> in the text letter by letter,
    never as the special token. So no text can fake a turn of the conversation.
    """

    vocab_size: int
    pad_id: int
    im_start_id: int
    im_end_id: int
    image_id: int
    newline_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def piece(self, id: int) -> bytes:
        """The bytes of one token. Those of a text's tokens, one after the other, are the text."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model whose control symbols include the four markers of ChatML.

    Raises:
      ValueError: the file is not a SentencePiece model, or a marker is missing.
    """

    def __init__(self, path: str | Path):
        import sentencepiece

        try:
            with paths.nearby(paths.path(path)) as file:
                self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        self.vocab_size = self._model.get_piece_size()
        self.pad_id = self._control(path, END_OF_TEXT)
        self.im_start_id = self._control(path, IM_START)
        self.im_end_id = self._control(path, IM_END)
        self.image_id = self._control(path, IMAGE)
        self.newline_ids = tuple(self.encode("\n"))
        self._special = {
            id: self._model.id_to_piece(id)
            for id in range(self.vocab_size)
            if self._model.is_control(id) or self._model.is_unknown(id)
        }

    def _control(self, path: str | Path, symbol: str) -> int:
        id = self._model.piece_to_id(symbol)
        if id == self._model.unk_id() or not self._model.is_control(id):
            raise ValueError(
                f"{path} has no control symbol {symbol}; train it with control_symbols"
            )
        return id

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        parts, run = [], []
        for id in map(int, ids):
            if id in self._special:
                parts += [self._model.decode(run), "" if skip_special else self._special[id]]
                run = []
            else:
                run.append(id)
        return "".join([*parts, self._model.decode(run)])

    def piece(self, id: int) -> bytes:
        if id in self._special:
            return self._special[id].encode()
        piece = self._model.id_to_piece(id)
        if self._model.is_byte(id):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace("\u2581", " ").encode()


class TokenizerJson:
    """A byte-level BPE of the Qwen family.

    Args:
      path: a tokenizer.json; or a vocab.json (the older format) with merges.txt beside it, and with
        added_tokens.json if there are special tokens.
      image_id: the id of `<image>`, for a file without this token, such as a plain Qwen2 vocabulary;
        151646 for Pangea. If the file has the token, the ids must be equal.

    Raises:
      NoImageToken: the file has no `<image>` and `image_id` is None.
      ValueError: the file cannot be read, a marker of ChatML is missing, or `<image>` has another
        id.
    """

    def __init__(self, path: str | Path, image_id: int | None = None):
        import tokenizers

        path = paths.path(path)
        try:
            self._model = _read_bpe(path) if path.name == "vocab.json" else _read_json(path)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        # This flag makes `encode` spell out special tokens, but not ordinary added tokens. Some files
        # have the markers as ordinary added tokens. So they become special tokens here.
        self._model.encode_special_tokens = True
        markers = (END_OF_TEXT, IM_START, IM_END, IMAGE)
        present = [marker for marker in markers if self._model.token_to_id(marker) is not None]
        self._model.add_special_tokens(
            [tokenizers.AddedToken(marker, normalized=False) for marker in present]
        )
        self.pad_id = self._required(path, END_OF_TEXT)
        self.im_start_id = self._required(path, IM_START)
        self.im_end_id = self._required(path, IM_END)
        stored = self._model.token_to_id(IMAGE)
        if stored is None and image_id is None:
            raise NoImageToken(f"{path} has no token {IMAGE}; pass image_id (151646 for Pangea)")
        if None not in (stored, image_id) and stored != image_id:
            raise ValueError(f"{path} has {IMAGE} at {stored}, not at image_id={image_id}")
        self._path = path
        self.image_id = stored if stored is not None else image_id
        self.vocab_size = max(self._model.get_vocab_size(with_added_tokens=True), self.image_id + 1)
        self.newline_ids = tuple(self.encode("\n"))

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json in which `<image>` is a special token.

        Raises:
          ValueError: `<image>` would get another id, because a file has no gaps between its ids.
        """
        import tokenizers

        copy = tokenizers.Tokenizer.from_str(self._model.to_str())
        copy.add_special_tokens([tokenizers.AddedToken(IMAGE, normalized=False)])
        if copy.token_to_id(IMAGE) != self.image_id:
            raise ValueError(
                f"{self._path} has no token {IMAGE}, and the next free id is "
                f"{copy.token_to_id(IMAGE)}, not {self.image_id}: the file belongs to another model"
            )
        copy.save(str(path))

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        # `tokenizers` does not pickle this flag. Without it a text could fake a turn in a worker.
        self._model.encode_special_tokens = True

    def _required(self, path: str | Path, symbol: str) -> int:
        id = self._model.token_to_id(symbol)
        if id is None:
            raise ValueError(f"{path} has no token {symbol}; use the tokenizer of Qwen2 or Qwen3")
        return id

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        parts, run = [], []
        for id in map(int, ids):
            if id == self.image_id:
                parts += [self._decode(run, skip_special), "" if skip_special else IMAGE]
                run = []
            else:
                run.append(id)
        return "".join([*parts, self._decode(run, skip_special)])

    def piece(self, id: int) -> bytes:
        piece = IMAGE if id == self.image_id else self._model.id_to_token(id) or ""
        if id == self.image_id or id in self._model.get_added_tokens_decoder():
            return piece.encode()
        return bytes(map(_BYTE_OF_LETTER.__getitem__, piece))

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        return self._model.decode(ids, skip_special_tokens=skip_special)


def _read_json(path: Path):
    import tokenizers

    with paths.nearby(path) as file:
        return tokenizers.Tokenizer.from_file(str(file))


def _read_bpe(vocabulary: Path):
    """Reads vocab.json, merges.txt and added_tokens.json of Qwen2."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    folder = vocabulary.parent
    with paths.nearby(vocabulary) as words, paths.nearby(folder / "merges.txt") as merges:
        model = tokenizers.Tokenizer(models.BPE.from_file(str(words), str(merges)))
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    added = folder / "added_tokens.json"
    ids = parse_json(added.read_text(encoding="utf-8")) if added.is_file() else {}
    tokens = sorted(ids, key=ids.get)
    model.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])
    moved = [token for token in tokens if model.token_to_id(token) != ids[token]]
    if moved:
        raise ValueError(f"{added}: {moved[0]} cannot have id {ids[moved[0]]}")
    return model


def load_tokenizer(path: str | Path, image_id: int | None = None) -> Tokenizer:
    """Loads the tokenizer at `path`: a `.model` file, a `.json` file, or a folder with one.

    Args:
      path: a file, or a folder with `tokenizer.json`, `tokenizer.model` or `vocab.json`.
      image_id: see `TokenizerJson`; not used by SentencePiece models.

    Raises:
      FileNotFoundError: no such file; the message lists the paths that were tried.
    """
    path = paths.path(path)
    candidates = [path / name for name in FILES] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix == ".model":
            return SentencePieceTokenizer(candidate)
        if candidate.is_file() and candidate.suffix == ".json":
            return TokenizerJson(candidate, image_id)
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"no tokenizer: looked for {looked} (a .model or .json file)")
