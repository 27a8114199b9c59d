"""Answers conversations with a model: `generate`, `serve`, `stream`, `logits`, `loglikelihood`."""

import dataclasses
import itertools
import operator
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

from pangea_jax import checkpoints, sharding
from pangea_jax.assets import SAMPLE_MODEL
from pangea_jax.batch import Batch
from pangea_jax.checkpoints import rounded
from pangea_jax.data import chat
from pangea_jax.data.reader import REFERENCE, Geometry, Reader, ReadingPolicy, Tiles
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.generate import batching, likelihood
from pangea_jax.generate.decode import Likely, Sampling, until
from pangea_jax.generate.likelihood import Candidates, LogLikelihood
from pangea_jax.generate.programs import Programs
from pangea_jax.generate.prompt import Prompt
from pangea_jax.model import Pangea, PangeaConfig
from pangea_jax.model import params as model_params

Conversation = Sequence[Mapping[str, Any]]
# Between two pieces of a streamed answer. A reader does not see that they are not sent at once.
STREAM_SECONDS = 0.05


class Engine:
    """A model with its tokenizer and its way of reading pictures.

    A conversation is one of:
      - a list of messages in the format of transformers and OpenAI, see
        `pangea_jax.data.chat.from_messages`;
      - a text, which the model continues without the chat template;
      - a `Prompt` that `read` has made of one of these.

    Args:
      policy: how the model reads conversations. Use the one that it was trained with.
      mesh: the devices that hold the model (`pangea_jax.sharding`); rows are split over its data
        axes. With several processes, each must make the same calls.
    """

    def __init__(
        self,
        model: Pangea,
        tokenizer: Tokenizer,
        *,
        policy: ReadingPolicy = REFERENCE,
        mesh: Mesh | None = None,
    ):
        self.config, self.tokenizer, self.mesh = model.config, tokenizer, mesh
        self._tiles = Tiles(Geometry.of(model.config), policy)
        self.reader = Reader(tokenizer, self._tiles)
        self._programs = Programs(model, mesh)

    def replace(self, model: Pangea | None) -> None:
        """Answers with other parameters from now on, with the programs compiled so far. None frees the old ones."""
        self._programs.params = None if model is None else nnx.split(model)[1]

    def read(self, conversation: Conversation | str, max_new_tokens: int = 0) -> Prompt:
        """Prepares a conversation for the other methods: decodes its images and cuts their tiles.

        Raises:
          ImageError, FileNotFoundError, ValueError: see `generate`.
        """
        return self._prompt(conversation, max_new_tokens, "conversation")

    def shape(self, prompt: Prompt) -> tuple[int, int]:
        """(tokens, tiles) to which a prompt is padded. Prompts of one shape share a program."""
        return self._width(len(prompt.tokens)), self._tile_bucket(len(prompt.tiles))

    def generate(
        self,
        conversations: Sequence[Conversation | str | Prompt],
        max_new_tokens: int = 64,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_p: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        seed: int | Sequence[int] = 0,
        stop: Sequence[int] | None = None,
        stop_strings: Collection[str] = (),
        batch_size: int = 16,
    ) -> list[str]:
        """The model's next message in each conversation. Decoding is greedy by default.

        The parameters are many because each setting is one keyword, as in transformers.

        Args:
          temperature, top_p, top_k, seed: see `Sampling`; one for all, or one per conversation.
          stop: ids that end an answer; by default those of <|im_end|> and <|endoftext|>.
          stop_strings: texts that end an answer. The answer does not contain them.
          batch_size: number of conversations that are answered together.

        Raises:
          ImageError: an image cannot be used; the message names it.
          FileNotFoundError: the file of an image does not exist.
          ValueError: a message cannot be read, a setting is out of range, or a prompt and its answer
            exceed the model's context.
        """
        _check_batch_size(batch_size)
        _check_new_tokens(max_new_tokens)
        if isinstance(conversations, str | bytes | Mapping | Prompt) or not isinstance(
            conversations, Iterable
        ):
            raise ValueError(f"conversations is one {type(conversations).__name__}; give a list")
        prompts = [
            self._prompt(conversation, max_new_tokens, f"conversations[{i}]")
            for i, conversation in enumerate(conversations)
        ]
        settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        sampling = Sampling.make(len(prompts), **settings)
        stop_ids = self._stop_ids(stop)
        if not prompts:
            return []
        order = sorted(range(len(prompts)), key=lambda i: self.shape(prompts[i]), reverse=True)
        answers = self.serve(
            ((prompts[i], sampling.rows(slice(i, i + 1))) for i in order),
            max_new_tokens,
            rows=min(batch_size, len(prompts)),
            width=max(self.shape(prompt)[0] for prompt in prompts),
            stop=stop_ids.tolist(),
            stop_strings=stop_strings,
        )
        found = {order[place]: text for place, text in answers}
        return [found[i] for i in range(len(prompts))]

    def serve(
        self,
        prompts: Iterable[tuple[Prompt, Sampling]],
        max_new_tokens: int,
        *,
        rows: int,
        width: int,
        stop: Sequence[int] | None = None,
        stop_strings: Collection[str] = (),
    ) -> Iterator[tuple[int, str]]:
        """Answers prompts and yields (number of the prompt, answer) when an answer is complete.

        When an answer ends, its row takes the next prompt. If a prompt begins like the prompt in a
        row, with the same images, only the rest of it is computed.

        Args:
          prompts: from `read`, each with `Sampling` for one row. They are fetched while the device
            works. Neighbours with the same shape are read together.
          rows: number of answers that are generated at the same time.
          width: tokens of the longest prompt, as `shape` gives them.
          stop, stop_strings: see `generate`.

        Raises:
          ValueError: `rows` is less than 1, or a prompt is longer than `width`.
        """
        batch = self.open(rows, width, bucket(max_new_tokens), stop=stop)
        ends = batching.StopStrings(stop_strings) if stop_strings else None
        feed = (
            batching.Request(number, prompt, sampling, max_new_tokens, ends)
            for number, (prompt, sampling) in enumerate(prompts)
        )
        for progress in batching.run(batch, lambda most, _: itertools.islice(feed, most)):
            if progress.ended:
                text = progress.text
                if text is None:
                    text = self._text(progress.tokens, batch.stop_ids)
                yield progress.request.name, text

    def open(
        self,
        rows: int,
        width: int,
        max_new_tokens: int,
        *,
        stop: Sequence[int] | None = None,
        top: int = 0,
    ) -> batching.Batch:
        """Empty rows for `batching.run`; see `serve`, and `batching.Batch` for `top`."""
        return batching.Batch(
            self._programs,
            rows,
            width,
            max_new_tokens=max_new_tokens,
            stop_ids=self._stop_ids(stop),
            decode=self.tokenizer.decode,
            shape=self.shape,
            lay=self._batch,
            top=top,
        )

    def _text(self, tokens: Sequence[int], stop_ids: Collection[int]) -> str:
        return self.tokenizer.decode(until(tokens, stop_ids))

    def stream(
        self,
        messages: Conversation,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[int] | None = None,
    ) -> Iterator[str]:
        """The answer to one conversation in pieces, as `generate` would give it whole.

        A piece never ends within a character. The call raises all errors, not the iterator.
        """
        _check_new_tokens(max_new_tokens)
        prompt = self._prompt(messages, max_new_tokens, "messages")
        sampling = Sampling.make(1, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        batch = self.open(1, self.shape(prompt)[0], bucket(max_new_tokens), stop=stop)
        request = batching.Request(None, prompt, sampling, max_new_tokens)
        return _pieces(self._tokens(batch, request), self.tokenizer, batch.stop_ids)

    def logits(self, messages: Conversation) -> Float[np.ndarray, "T V"]:
        """float32 logits at every token of one conversation.

        If the last message is the user's, the header of the next answer follows it.
        """
        prompt = self._prompt(messages, 0, "messages")
        logits = self._programs.forward(self._batch([prompt]))
        return np.asarray(logits[0, : len(prompt.tokens)])

    def candidates(
        self, conversation: Conversation | str, continuations: Sequence[str]
    ) -> tuple[Prompt, Candidates]:
        """The input of `loglikelihood`: the tokens that all continuations share, and the rest of each.

        If the conversation is a text, text and continuation are tokenised together; the continuation
        starts at token n if the text alone has n tokens, as in lm-eval. After messages, the
        continuation is tokenised alone. An empty text becomes <|endoftext|>.

        Raises:
          ValueError: a continuation is no text, has no tokens, or exceeds the model's context.
        """
        if isinstance(continuations, str) or not (
            isinstance(continuations, Sequence) and all(isinstance(c, str) for c in continuations)
        ):
            raise ValueError(f"continuations {chat.shown(continuations)} is not a list of texts")
        for i, text in enumerate(continuations):
            _check_text(text, f"continuations[{i}]")
        prompt = self.read(conversation)
        if isinstance(conversation, str) and conversation:
            wholes = [self.tokenizer.encode(conversation + text) for text in continuations]
        else:
            wholes = [
                prompt.tokens.tolist() + self.tokenizer.encode(text) for text in continuations
            ]
        found = Candidates.make(wholes, len(prompt.tokens))
        longest, context = max(map(len, wholes)), self.config.language.max_positions
        if longest > context:
            raise ValueError(
                f"prompt and continuation have {longest} tokens, over the model's context of {context}"
            )
        # Not the text's own tokens: the first letters of a continuation may change the last one.
        tokens = np.asarray(wholes[0][: found.shared], np.int32)
        index = prompt.image_index[: found.shared]
        return dataclasses.replace(prompt, tokens=tokens, image_index=index), found

    def loglikelihood(
        self, items: Sequence[tuple[Prompt, Candidates]], *, batch_size: int = 16
    ) -> list[list[LogLikelihood]]:
        """The log-likelihood of each continuation; `items` come from `candidates`."""
        _check_batch_size(batch_size)
        results = []
        for start in range(0, len(items), batch_size):
            chosen = items[start : start + batch_size]
            batch = self._batch([prompt for prompt, _ in chosen])
            tails = self._programs.place(likelihood.pad_candidates([c for _, c in chosen]))
            total, greedy = map(np.asarray, self._programs.score(batch, *tails))
            for b, (_, found) in enumerate(chosen):
                results.append(
                    [
                        LogLikelihood(
                            float(total[b, a]), len(tail) - found.unscored, bool(greedy[b, a])
                        )
                        for a, tail in enumerate(found.tails)
                    ]
                )
        return results

    def echo(self, prompts: Sequence[Prompt], top: int = 1) -> list[Likely]:
        """The log-probability of each token of a prompt after those before it.

        Args:
          prompts: read together, padded to the longest one.
          top: number of likeliest tokens at each place whose log-probabilities are given, too.

        Returns:
          For each prompt arrays [T], [T, K], [T, K]. Those of its first token mean nothing.
        """
        found = jax.tree.map(np.asarray, self._programs.echo(self._batch(prompts), top=top))
        return [
            jax.tree.map(lambda x: x[row, : len(prompt.tokens)], found)  # noqa: B023
            for row, prompt in enumerate(prompts)
        ]

    def _tokens(self, batch: batching.Batch, request: batching.Request) -> Iterator[int]:
        """Yields the tokens of one answer."""
        feed = iter([request])
        steps = batching.run(
            batch, lambda most, _: itertools.islice(feed, most), pace=STREAM_SECONDS
        )
        for progress in steps:
            yield from progress.tokens[len(progress.tokens) - progress.new :]

    def _prompt(
        self, messages: Conversation | str | Prompt, max_new_tokens: int, name: str
    ) -> Prompt:
        """Reads a conversation. Refuses one that is too long before it cuts the tiles."""
        if isinstance(messages, Prompt | str):
            if isinstance(messages, str):
                _check_text(messages, name)
                ids = self.tokenizer.encode(messages) or [self.tokenizer.pad_id]
                tokens = np.asarray(ids, np.int32)
                messages = Prompt(tokens, np.full_like(tokens, -1), self.reader.no_tiles)
            self._check_length(len(messages.tokens), max_new_tokens, name)
            return messages
        if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
            raise ValueError(
                f"{name} is not a list of messages: {chat.shown(messages)}; one conversation is "
                '[{"role": "user", "content": ...}], several are a list of such lists'
            )
        system, turns, pictures = chat.from_messages(messages)
        for text in (system, *(turn.text for turn in turns)):
            _check_text(text, name)
        looks = []
        for i, picture in enumerate(pictures, 1):
            is_path = isinstance(picture, str | os.PathLike)
            label = os.fspath(picture) if is_path else f"{name}, image {i}"
            looks.append(self._tiles.given(picture, label, len(pictures) > 1))
        rendered = self.reader.words(
            turns,
            [look.place for look in looks],
            system=system,
            answer_next=turns[-1].role == "user",
        )
        self._check_length(len(rendered.tokens), max_new_tokens, name)
        return Prompt(rendered.tokens, rendered.image_index, self.reader.cut(looks))

    def _check_length(self, length: int, max_new_tokens: int, name: str) -> None:
        context = self.config.language.max_positions
        if length + max_new_tokens > context:
            raise ValueError(
                f"{name}: {length} prompt tokens and {max_new_tokens} new ones exceed the model's "
                f"context of {context}"
            )

    def _batch(self, prompts: Sequence[Prompt]) -> Batch:
        """Right-padded rows on the devices, in few shapes, so that few programs are compiled."""
        width = self._width(max(len(prompt.tokens) for prompt in prompts))
        tiles = self._tile_bucket(max(len(prompt.tiles) for prompt in prompts))
        return self._programs.place(Batch.fill([[prompt] for prompt in prompts], width, tiles, 0))

    def _width(self, tokens: int) -> int:
        return min(bucket(tokens), self.config.language.max_positions)

    def _tile_bucket(self, tiles: int) -> int:
        """Rounds up to 0, 1, or a multiple of the largest number of tiles of one image."""
        side = self.config.vision.image_size
        most = 1 + max((w * h // side**2 for w, h in self.config.pinpoints), default=0)
        return tiles if tiles < 2 else tiles + -tiles % most

    def _stop_ids(self, stop: Sequence[int] | None) -> Int[np.ndarray, " Z"]:
        ids = (self.tokenizer.im_end_id, self.tokenizer.pad_id) if stop is None else stop
        is_list = isinstance(ids, Iterable) and not isinstance(ids, str | bytes | Mapping)
        ids, known = list(ids) if is_list else [], np.iinfo(np.int32)
        if not (is_list and all(_is_whole(i) and known.min <= i <= known.max for i in ids)):
            raise ValueError(f"stop {chat.shown(stop)} is not a list of token ids (32 bits each)")
        # -1 is the id of no token.
        return np.array(sorted(set(ids)) or [-1], np.int32)


def bucket(size: int) -> int:
    """Rounds `size` up to a multiple of 64, and to one of four lengths between two powers of two.

    So a context of 32,768 has 32 shapes, and at most a quarter is padding.

    Raises:
      ValueError: `size` is less than 1.
    """
    size = operator.index(size)  # also takes NumPy's integers
    if size < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {size}")
    step = max(64, 1 << max(0, (size - 1).bit_length() - 3))
    return size + -size % step


def _check_text(text: str, name: str) -> None:
    """Refuses half a surrogate pair, as in broken JSON; tokenizers raise an unclear error there."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: a text is not Unicode ({error})") from None


class SettingError(ValueError, TypeError):
    """A setting has the wrong type; a TypeError too, as Python raises for such a type."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_new_tokens(max_new_tokens: Any) -> None:
    if not _is_whole(max_new_tokens):
        said = chat.shown(max_new_tokens)
        raise SettingError(f"max_new_tokens must be a whole number from 1 on, not {said}")


def _check_batch_size(batch_size: Any) -> None:
    if not _is_whole(batch_size) or batch_size < 1:
        said = chat.shown(batch_size)
        raise SettingError(f"batch_size must be a whole number of at least 1, not {said}")


def _pieces(tokens: Iterator[int], tokenizer: Tokenizer, stop_ids) -> Iterator[str]:
    """Yields the text of the tokens. A text that ends within a character waits for the rest."""
    ids, told = [], ""
    for token in tokens:
        if token in stop_ids:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if len(text) > len(told) and not text.endswith("\ufffd"):
            yield text[len(told) :]
            told = text
    rest = tokenizer.decode(ids)[len(told) :]
    if rest:
        yield rest


MeshChoice = Mesh | Mapping[str, int] | Literal["auto"] | None


def load_folder(
    path: str | os.PathLike,
    *,
    dtype=None,
    weights: str | None = None,
    mesh: MeshChoice = None,
    **reading: Any,
) -> Engine:
    """Loads a checkpoint in any form that `pangea_jax.checkpoints` reads, and its tokenizer.

    Args:
      dtype: of parameters and activations; by default bfloat16, as published, and float32 for the
        model in the package (the tower with the default point of the English-share ablation).
      weights: "int8", "int4" or "nf4": the form in which the language model is held, see
        `pangea_jax.model.quantized`; by default that of the checkpoint.
      mesh: devices that hold the parameters, see `choose_mesh`. Each tensor goes straight to its
        devices.
      reading: fields of `ReadingPolicy` that replace those saved with the model.
    """
    tokenizer = checkpoints.load_tokenizer(path)
    below = path.base if isinstance(path, checkpoints.AdapterFolder) else path
    if below == SAMPLE_MODEL:
        dtype = dtype or "float32"
    config = rounded.choose_form(checkpoints.config_from_folder(path), weights, path)
    config = dataclasses.replace(config, dtype=_dtype_name(dtype or config.dtype))
    policy = dataclasses.replace(checkpoints.load_policy(path), **reading)
    mesh = choose_mesh(mesh, config)
    graphdef, shapes = _abstract(config)
    targets = None
    if mesh is not None:
        targets = model_params.unflatten(sharding.param_shardings(shapes, mesh))
    state = checkpoints.load(path, config, dtype=jnp.dtype(config.dtype), shardings=targets)
    model = model_params.merge(graphdef, model_params.flatten(state))
    if mesh is None and jax.default_backend() == "cpu":
        model.language.unstack()
    return Engine(model, tokenizer, policy=policy, mesh=mesh)


def choose_mesh(
    mesh: MeshChoice,
    config: PangeaConfig | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh | None:
    """The devices that hold a model.

    Args:
      mesh: None for one device; or sizes of axes as in `config.mesh` of a training run, where `data`
        defaults to all devices that the other axes leave; or "auto" for all devices of this process.
        "auto" splits each layer over as many devices as divide its heads and widths, because fsdp
        would send parameters at every decoding step. The other devices share the rows.
      config: of the model, for "auto".
      devices: to choose from; by default all devices, those of other processes too, and for "auto"
        those of this process.

    Raises:
      ValueError: the sizes do not fill the devices, or an axis is unknown.
    """
    if mesh is None or isinstance(mesh, Mesh):
        return mesh
    if mesh != "auto":
        if unknown := sorted(set(mesh) - set(sharding.AXES)):
            raise ValueError(f"mesh has no axis {unknown[0]!r}; it has {', '.join(sharding.AXES)}")
        data = 1 if -1 in mesh.values() else -1
        sizes = {"data": data, "fsdp": 1, "tensor": 1} | dict(mesh)
        return sharding.make_mesh(**sizes, devices=devices)
    devices = jax.local_devices() if devices is None else devices
    if len(devices) == 1:
        return None
    shapes = _abstract(config)[1]
    for tensor in (n for n in range(len(devices), 0, -1) if len(devices) % n == 0):
        found = sharding.make_mesh(data=-1, fsdp=1, tensor=tensor, devices=devices)
        try:
            sharding.param_shardings(shapes, found)
        except ValueError:
            continue
        return found
    raise AssertionError("one device can always hold the parameters")


def _abstract(config: PangeaConfig):
    return model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0)))


def _dtype_name(dtype) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {name} is not float32, bfloat16 or float16")
    return name
