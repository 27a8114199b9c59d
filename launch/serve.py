"""Serves a model to clients of OpenAI's API, and a page to try it in a browser (docs/serving.md).

    python launch/serve.py --model=sample              # then open http://127.0.0.1:8000
    python launch/serve.py --model=DIR --host=0.0.0.0 --api_key_file=KEY

Only this machine reaches the server unless --host says otherwise. SIGTERM ends it: answers under way are finished.
"""

import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

from absl import flags, logging

import pangea_jax
from launch import common
from pangea_jax.generate import fit
from pangea_jax.generate.engine import Engine, bucket
from pangea_jax.model import quantized

_MODEL = flags.DEFINE_string("model", "sample", 'Folder, hub name, or "sample".')
_BASE = flags.DEFINE_string("base", None, "If --model holds adapters: the model below them.")
_DTYPE = flags.DEFINE_string("dtype", None, "Type of parameters and activations.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, quantized.FORMS, "Hold the language model in 8 or 4 bits."
)
_NAME = flags.DEFINE_string(
    "name", None, "The model's name in requests; by default the last part of --model."
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all.")
_PORT = flags.DEFINE_integer("port", 8000, "0 takes a free one.", lower_bound=0, upper_bound=65535)
_KEY_FILE = flags.DEFINE_string(
    "api_key_file", None, "File with the key that callers must send; or set PANGEA_API_KEY."
)
_URLS = flags.DEFINE_bool("allow_urls", False, "Read pictures behind http(s) addresses, too.")
_ROWS = flags.DEFINE_integer("rows", None, "Answers at once.", lower_bound=1)
_PROMPT = flags.DEFINE_integer("max_prompt", 4096, "Longest prompt in tokens.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("max_tokens", 1024, "Longest answer in tokens.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Of requests that give none.", lower_bound=0, upper_bound=2
)
_LIMITS = {
    "waiting": flags.DEFINE_integer(
        "queue", 64, "Requests that may wait; more get status 429.", lower_bound=0
    ),
    "seconds": flags.DEFINE_float("deadline", 300.0, "Seconds for an answer.", lower_bound=0.1),
    "body": flags.DEFINE_integer("max_body", 32 << 20, "Bytes of a request.", lower_bound=1024),
    "pictures": flags.DEFINE_integer("max_pictures", 8, "Pictures in a request.", lower_bound=0),
    "pixels": flags.DEFINE_integer(
        "max_pixels", 40_000_000, "Pixels of a request's pictures together.", lower_bound=1
    ),
}
_CHUNK = flags.DEFINE_integer(
    "chunk", 512, "Tokens of long prompts that are read between steps of answers.", lower_bound=64
)
_LOG = flags.DEFINE_bool("log_requests", False, "A line for each request, without texts.")

# Largest number of rows that is chosen without --rows: more hardly raise the rate of a small model on a CPU.
_MOST_ROWS = 16
_KEY_BYTES = 4096


def main(argv):
    if len(argv) > 1:
        raise common.UserError(f"unexpected argument {argv[1]!r}; the model is --model=DIR")
    try:
        import uvicorn

        from pangea_jax.serving import app as serving_app
        from pangea_jax.serving import page
        from pangea_jax.serving.guard import LOOPBACK_NAMES
        from pangea_jax.serving.inputs import Limits
    except ImportError as error:
        raise common.UserError(
            f"{error.name} is missing; run: pip install -r requirements-serve.txt"
        ) from None
    logging.set_verbosity(logging.INFO if _LOG.value else logging.WARNING)
    key, fetch = _key(), _fetch()
    line = _listen(_HOST.value, _PORT.value)
    common.use_compile_cache()
    signal.signal(signal.SIGTERM, _end)
    try:
        engine = pangea_jax.load(
            _MODEL.value, base=_BASE.value, dtype=_DTYPE.value, weights=_WEIGHTS.value
        )
        context = engine.config.language.max_positions
        prompt = min(_PROMPT.value, context - 1)
        answer = min(_TOKENS.value, context - 1)
        limits = Limits(prompt, answer, **{name: flag.value for name, flag in _LIMITS.items()})
        name = _NAME.value or os.path.basename(os.path.normpath(_MODEL.value))
        is_local = _is_loopback(_HOST.value)
        is_sample = _MODEL.value == "sample" and not _BASE.value
        shown_model = page.sample_info(name) if is_sample else page.PageInfo(name)
        config = uvicorn.Config(
            serving_app.make(
                engine,
                name,
                limits,
                rows=_ROWS.value or _rows(engine, prompt, answer),
                chunk=_CHUNK.value,
                key=key,
                hosts=LOOPBACK_NAMES | {_HOST.value} if is_local else None,
                fetch=fetch,
                temperature=_TEMPERATURE.value,
                page=page.router(shown_model),
                on_broken=lambda: os.kill(os.getpid(), signal.SIGTERM),
            ),
            log_config=None,
            log_level="info" if _LOG.value else "warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(_LIMITS["seconds"].value) + 10,
        )
        if key is None and not is_local:
            logging.warning("anyone who reaches this machine can use the server: it has no key")
        host, port = _HOST.value, line.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        print(f"{name} is served at http://{shown}:{port}", flush=True)
        uvicorn.Server(config).run(sockets=[line])
    except KeyboardInterrupt:
        sys.exit(common.EXIT_INTERRUPTED)


def _end(*_):
    sys.exit(0)


def _listen(host: str, port: int) -> socket.socket:
    """
    Raises:
      UserError: the address is taken, or is not one of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        line = socket.socket(family)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        line.bind((host, port))
        line.listen(2048)
    except OSError as error:
        raise common.UserError(
            f"cannot listen at {host}, port {port} ({error.strerror}); give another --port or --host"
        ) from None
    return line


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _key() -> str | None:
    if _KEY_FILE.value is None:
        return os.environ.get("PANGEA_API_KEY") or None
    key = Path(_KEY_FILE.value).read_bytes()[:_KEY_BYTES].decode("ascii", "replace").strip()
    if not key or not key.isascii() or len(key.split()) != 1:
        raise common.UserError(f"{_KEY_FILE.value} holds no key: one word of ASCII letters")
    return key


def _fetch():
    """What reads addresses: only public ones, as the crawler does. Nobody crawls here, so robots.txt is not asked."""
    if not _URLS.value:
        return None
    from pangea_jax.curation import web

    return web.Fetch(robots=False)


def _rows(engine: Engine, prompt: int, answer: int) -> int:
    """How many answers the memory holds at once, at most `_MOST_ROWS`."""
    config, card = engine.config, fit.this_card()
    side = config.vision.image_size
    tiles = 1 + max((w * h // side**2 for w, h in config.pinpoints), default=0)
    width = min(bucket(prompt), config.language.max_positions)
    slots = width + bucket(answer)
    rows = fit.rows_of_answers(config, fit.SHARE * card.memory, width, tiles, slots)
    if rows < 1:
        raise common.UserError(
            f"the memory of {card.name} does not hold a prompt of {prompt:,} and an answer of {answer:,} tokens; lower "
            "--max_prompt or --max_tokens"
        )
    return min(rows, _MOST_ROWS)


if __name__ == "__main__":
    common.run(main)
