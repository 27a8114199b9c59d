"""A conversation with a model in the terminal.

    python launch/chat.py --model=sample --image=cat.png
    python launch/chat.py --model=DIR --image=cat.png --prompt="Apa ini?"    # prints one answer

The model is "sample", a folder with a checkpoint or with adapters of peft, or a name on the Hugging Face hub.
`/image FILE` adds a picture to the next question, `/reset` starts a new conversation, `/quit` or Ctrl-D ends the
program, and Ctrl-C stops an answer.
"""

import os
import sys

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

from absl import flags, logging

import pangea_jax
from launch import common
from pangea_jax.data import image
from pangea_jax.figures import inert
from pangea_jax.model import quantized

_MODEL = flags.DEFINE_string("model", "sample", 'Folder, hub name, or "sample".')
_BASE = flags.DEFINE_string(
    "base", None, "If --model holds adapters: the model below them; by default the one they name."
)
_IMAGE = flags.DEFINE_multi_string("image", [], "Picture for the first question; may be repeated.")
_PROMPT = flags.DEFINE_string("prompt", None, "Answer this one question and exit.")
_SYSTEM = flags.DEFINE_string("system", None, "System prompt; the model's own by default.")
_SAMPLING = (
    flags.DEFINE_integer("max_new_tokens", 256, "Longest answer.", lower_bound=1),
    flags.DEFINE_float("temperature", 0.0, "0 always takes the likeliest token."),
    flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens with this probability."),
    flags.DEFINE_integer("top_k", 0, "Sample from this number of likeliest tokens; 0 for all."),
    flags.DEFINE_integer("seed", 0, "Seed of the sampling."),
)
_ORIENTATION = flags.DEFINE_enum(
    "orientation",
    "upright",
    image.ORIENTATIONS,
    "upright turns a picture as its EXIF tag says, as phones mean it; stored does not.",
)
_DTYPE = flags.DEFINE_string(
    "dtype", None, "Type of parameters and activations: bfloat16, float32 or float16."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    quantized.FORMS,
    "Hold the language model in 8 or 4 bits; rounded as it is read.",
)


class Chat:
    """The conversation until now, and the pictures of the next question."""

    def __init__(self, engine, system: str | None, settings: dict):
        self._engine, self._settings = engine, settings
        self._opening = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        self._messages, self._pictures = list(self._opening), []

    def add_image(self, path: str) -> None:
        """
        Raises:
          UserError, ImageError: the file does not exist, or is not a picture.
        """
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise common.UserError(f"there is no file {path}")
        image.check(path)
        self._pictures.append({"type": "image", "image": path})

    def ask(self, text: str):
        """Yields pieces of the answer, then adds question and answer to the conversation.

        If the answer is stopped, its pieces until then are added. If the model refuses the question, nothing is added.
        """
        content = [*self._pictures, {"type": "text", "text": text}]
        asked = [*self._messages, {"role": "user", "content": content}]
        pieces = self._engine.stream(asked, **self._settings)
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
        finally:
            self._pictures = []
            self._messages = [*asked, {"role": "assistant", "content": answer or " "}]


def main(argv):
    if len(argv) > 1:
        raise common.UserError(f"unexpected argument {argv[1]!r}; a question is --prompt=TEXT")
    if _SYSTEM.value == "":
        raise common.UserError(
            "--system is empty; leave it out to use the model's own system prompt"
        )
    settings = {flag.name: flag.value for flag in _SAMPLING}
    logging.set_verbosity(logging.WARNING)
    common.use_compile_cache()

    try:
        engine = pangea_jax.load(
            _MODEL.value,
            base=_BASE.value,
            dtype=_DTYPE.value,
            weights=_WEIGHTS.value,
            orientation=_ORIENTATION.value,
        )
        chat = Chat(engine, _SYSTEM.value, settings)
        for path in _IMAGE.value:
            chat.add_image(path)
        if _PROMPT.value is None:
            converse(chat)
        else:
            write_answer(chat, _PROMPT.value)
    except KeyboardInterrupt:
        sys.exit(common.EXIT_INTERRUPTED)


def converse(chat: Chat) -> None:
    """Reads questions and commands until the end of the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - gives `input` history and editing

        print("/image FILE, /reset, /quit", file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "").strip()
            if line == "/quit":
                return
            if line:
                obey(chat, line)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        except (common.UserError, OSError, ValueError) as error:
            print("error:", *inert.visible(str(error)).split(), file=sys.stderr)


def obey(chat: Chat, line: str) -> None:
    """Handles one input line: a command or a question."""
    command, _, argument = line.partition(" ")
    if command == "/reset":
        chat.reset()
    elif command == "/image" and argument.strip():
        chat.add_image(argument.strip().strip("'\""))
    elif command.startswith("/") and "/" not in command[1:]:
        raise common.UserError(
            f"{command} is not a command; the commands are /image FILE, /reset, /quit"
        )
    else:
        write_answer(chat, line)


def write_answer(chat: Chat, text: str) -> None:
    for piece in chat.ask(text):
        print(inert.visible(piece), end="", flush=True)
    print()


if __name__ == "__main__":
    common.run(main)
