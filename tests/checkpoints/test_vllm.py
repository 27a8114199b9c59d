"""What vLLM would find in an exported folder.

vLLM needs a GPU build of torch of its own and is not run here. These are facts about its 0.33, read off
`LlavaNextForConditionalGeneration`, `CLIPVisionModel` and `Qwen2ForCausalLM` there: how it renames tensors, which
parameters it has, and which fields of the config it reads.
"""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from pangea_jax import checkpoints
from pangea_jax.checkpoints.huggingface import abstract_state
from tests.checkpoints.tiny import TOKENS, tensors, with_language

# Prefixes that it replaces, in this order; any other name is taken as it is.
RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
# Modules of one kernel that it loads from several tensors.
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
# It builds the tower up to the layer that is read, and leaves out what lies behind it.
LEFT_OUT = re.compile(r"vision_tower\.vision_model\.(post_layernorm|encoder\.layers\.2)\.")
BOTH = ("weight", "bias")


def modules(prefix, **parts):
    return {f"{prefix}{name}.{kind}" for name, kinds in parts.items() for kind in kinds}


def parameters(tied: bool) -> set[str]:
    """Of `CONFIG` in vLLM, fused ones by their parts."""
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
    """The parameter that a tensor goes into, None if vLLM leaves it out."""
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
    assert len(found) - len(kept) == 2 + 16  # the norm and the layer behind the one that is read
    assert sorted(kept) == sorted(parameters(tied))


def test_the_names_that_transformers_5_writes_miss_the_tower(exported):
    """Why `launch/convert.py` writes the others: vLLM keeps `vision_model` in the names of its tower."""
    tied, make = exported
    found = {taken(name) for name in tensors(make(layout="transformers-5"))}
    missing = parameters(tied) - found
    assert missing == {name for name in parameters(tied) if name.startswith("vision_tower.")}


def test_the_default_layout_is_one_that_is_read(exported):
    _, make = exported
    assert set(tensors(make())) == set(tensors(make(layout="transformers-4")))


def test_the_config_has_the_fields_that_are_read(exported):
    """As vLLM does, through transformers' own config class."""
    transformers = pytest.importorskip("transformers", reason="requirements-parity.txt has it")
    tied, make = exported
    folder = make()
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert written["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    read = transformers.AutoConfig.from_pretrained(folder)
    assert type(read).__name__ == "LlavaNextConfig"
    assert (read.vision_feature_layer, read.vision_feature_select_strategy) == (-2, "default")
    assert (read.projector_hidden_act, read.multimodal_projector_bias) == ("gelu", True)
    assert read.image_token_index == 96
    # (height, width), as there.
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
