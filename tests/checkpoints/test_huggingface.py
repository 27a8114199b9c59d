"""Public checkpoints: every layout is read, the same bytes are written, and errors name every fault."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pangea_jax import checkpoints
from pangea_jax.checkpoints import CheckpointError, names
from pangea_jax.checkpoints.huggingface import abstract_state
from pangea_jax.model import PINPOINTS, LanguageConfig, Pangea, PangeaConfig
from tests.checkpoints.tiny import (
    CONFIG,
    TOKENS,
    assert_same_state,
    random_state,
    save_in_shards,
    tensors,
)

KINDS = [("qwen2", False), ("qwen2", True), ("mistral", False), ("llama", True)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder in transformers-4 layout, and its state."""
    folder, state = tmp_path_factory.mktemp("saved"), random_state(CONFIG)
    checkpoints.save(state, CONFIG, folder, tokens=TOKENS)
    return folder, state


@pytest.mark.parametrize(("decoder", "tied"), KINDS)
def test_round_trip_is_byte_equal(make_reference, tmp_path, decoder, tied):
    reference = make_reference(decoder, tied)
    config = checkpoints.config_from_folder(reference.folder)
    model = checkpoints.load_model(reference.folder)
    checkpoints.save(model, config, tmp_path, tokens=TOKENS, layout="transformers-5")
    expected, found = tensors(reference.folder), tensors(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("layout", ["transformers-4", "transformers-5"])
@pytest.mark.parametrize(("decoder", "tied"), KINDS)
def test_transformers_loads_what_is_saved(make_reference, tmp_path, decoder, tied, layout):
    import torch
    import transformers

    reference = make_reference(decoder, tied)
    config = checkpoints.config_from_folder(reference.folder)
    state = checkpoints.load(reference.folder)
    save_in_shards(state, config, tmp_path, tokens=TOKENS, layout=layout)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        found, expected = (m(input_ids=ids).logits for m in (model.eval(), reference.model))
    assert torch.equal(found, expected)
    assert model.config.image_grid_pinpoints == reference.model.config.image_grid_pinpoints
    assert checkpoints.config_from_folder(tmp_path) == config


@pytest.mark.parametrize("layout", [name for name in names.LAYOUTS if name != "standalone"])
def test_every_layout_loads_to_the_same_state(saved, tmp_path, layout):
    _, state = saved
    checkpoints.save(state, CONFIG, tmp_path, tokens=TOKENS, layout=layout)
    assert_same_state(checkpoints.load(tmp_path, CONFIG), state)


def renamed(tensors, *replacements):
    out = {}
    for name, value in tensors.items():
        for old, new in replacements:
            name = new + name[len(old) :] if name.startswith(old) else name
        out[name] = value
    return out


def test_published_names_of_pangea_7b(saved, tmp_path):
    """The names are listed here as in neulab/Pangea-7B, and not taken from the table."""
    folder, state = saved
    save_file(
        renamed(
            tensors(folder),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("language_model.model.", "model."),
            ("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
            ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
            ("image_newline", "model.image_newline"),
        ),
        tmp_path / "model.safetensors",
    )
    assert "model.mm_projector.2.bias" in tensors(tmp_path)
    assert_same_state(checkpoints.load(tmp_path, CONFIG), state)


def test_table_covers_every_parameter_of_the_7b_and_counts_them():
    shapes = {
        ".".join(path): leaf.shape
        for path, leaf in nnx.to_flat_state(abstract_state(PangeaConfig()))
    }
    entries = names.entries(shapes, PangeaConfig(), names.LAYOUTS["llava"])
    total = sum(len(e.names) * int(np.prod(e.their_shape)) for e in entries)
    # Qwen2-7B + CLIP ViT-L/14-336 + projector + newline
    assert total == 7_615_616_512 + 303_507_456 + 16_522_240 + 3_584
    assert entries[-1].names != ()
    theirs = [name for entry in entries for name in entry.names]
    assert len(set(theirs)) == len(theirs)


def test_part_reading_equals_slicing_of_the_whole():
    """`read_part` reads less, for every axis along which devices split a parameter."""
    theirs = np.random.default_rng(0).normal(size=(6 * 4, 5))
    whole = names.read_part(theirs, "(h c) d -> d h c", (5, 6, 4), (slice(None),) * 3)
    np.testing.assert_array_equal(whole, theirs.reshape(6, 4, 5).transpose(2, 0, 1))
    for index in [
        (slice(0, 5), slice(2, 4), slice(0, 4)),
        (slice(1, 3), slice(0, 6), slice(None)),
        (slice(1, 2), slice(3, 6), slice(1, 3)),
    ]:
        part = names.read_part(theirs, "(h c) d -> d h c", (5, 6, 4), index)
        np.testing.assert_array_equal(part, whole[index])
    np.testing.assert_array_equal(names.to_theirs(whole, "(h c) d -> d h c"), theirs)


def test_loads_onto_shardings_and_saves_from_them(saved, tmp_path):
    """Splits the first axis of each parameter that divides: layers, heads or vocabulary."""
    folder, state = saved
    devices = jax.devices()[:2]
    assert len(devices) == 2, "the tests run on simulated devices, see conftest.py"
    mesh = jax.sharding.Mesh(np.array(devices), ("model",))

    def sharding(value):
        axis = next((i for i, n in enumerate(value.shape) if n % len(devices) == 0), None)
        spec = [None] * len(value.shape)
        if axis is not None:
            spec[axis] = "model"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    shardings = jax.tree.map(sharding, abstract_state(CONFIG))
    found = checkpoints.load(folder, shardings=shardings, dtype=jnp.bfloat16)
    for (path, value), (_, target) in zip(
        nnx.to_flat_state(found), nnx.to_flat_state(shardings), strict=True
    ):
        assert value[...].sharding == target.get_value(), path
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    assert_same_state(found, expected)
    checkpoints.save(found, CONFIG, tmp_path, tokens=TOKENS)
    assert_same_state(checkpoints.load(tmp_path), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_saving_and_loading_casts(saved, tmp_path, dtype):
    _, state = saved
    checkpoints.save(state, CONFIG, tmp_path, tokens=TOKENS, dtype=dtype)
    assert {value.dtype for value in tensors(tmp_path).values()} == {np.dtype(dtype)}
    assert_same_state(checkpoints.load(tmp_path), jax.tree.map(lambda x: x.astype(dtype), state))
    widened = checkpoints.load(tmp_path, dtype=jnp.float32)
    assert widened["newline_d"][...].dtype == jnp.float32


def test_values_beyond_float16_are_refused(saved, tmp_path):
    _, state = saved
    large = jax.tree.map(lambda x: x * 1e6, state)
    with pytest.raises(ValueError, match="beyond float16; choose bfloat16"):
        checkpoints.save(large, CONFIG, tmp_path, tokens=TOKENS, dtype=jnp.float16)
    assert not (tmp_path / "config.json").exists()


def test_a_tower_alone(saved, tmp_path):
    """A file with the keys of the tower gives only the tower of a model."""
    folder, state = saved
    prefix = "vision_tower.vision_model."
    tower = {k: v for k, v in tensors(folder).items() if k.startswith(prefix)}
    for name, short in (("long", prefix), ("short", "vision_tower."), ("clip", "vision_model.")):
        file = tmp_path / f"{name}.safetensors"
        save_file({short + k[len(prefix) :]: v for k, v in tower.items()}, file)
        found = checkpoints.load(file, CONFIG, only=("vision",))
        assert set(found) == {"vision"}
        model = Pangea(CONFIG, rngs=nnx.Rngs(0))
        before = model.language.embedding_vd[...].copy()
        nnx.update(model, found)
        assert_same_state(nnx.state(model.vision), state["vision"])
        np.testing.assert_array_equal(model.language.embedding_vd[...], before)
    with pytest.raises(CheckpointError, match="missing"):
        checkpoints.load(file, CONFIG)


def test_a_decoder_alone_from_a_text_checkpoint(saved, tmp_path):
    folder, state = saved
    prefix = "language_model."
    decoder = {k[len(prefix) :]: v for k, v in tensors(folder).items() if k.startswith(prefix)}
    save_file(decoder, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    found = checkpoints.load(tmp_path, CONFIG, only=("language",))
    assert_same_state(found["language"], state["language"])
    with pytest.raises(CheckpointError, match=r"no LLaVA; .*only=\('language',\)"):
        checkpoints.load(tmp_path)
    with pytest.raises(ValueError, match="choose some of"):
        checkpoints.load(tmp_path, CONFIG, only=("decoder",))


def test_missing_unexpected_and_misshapen_tensors_in_one_error(saved, tmp_path):
    folder, _ = saved
    broken = tensors(folder)
    del broken["language_model.model.layers.1.self_attn.q_proj.bias"]
    broken["language_model.model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    broken["image_newline"] = np.zeros(31, np.float32)
    broken["vision_tower.vision_model.embeddings.position_ids"] = np.zeros((1, 17), np.int64)
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(tmp_path, CONFIG)
    message = str(caught.value)
    assert "missing 1: language_model.model.layers.1.self_attn.q_proj.bias" in message
    assert "unexpected 1: language_model.model.layers.2.mlp.up_proj.weight" in message
    assert "image_newline is (31,), the config says (32,)" in message
    assert "position_ids" not in message


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(make_reference, tmp_path):
    reference = make_reference("qwen2", True)
    shutil.copy(reference.folder / "config.json", tmp_path)
    stored = tensors(reference.folder)
    head = stored["language_model.model.embed_tokens.weight"].copy()
    save_file(stored | {"language_model.lm_head.weight": head}, tmp_path / "model.safetensors")
    assert_same_state(checkpoints.load(tmp_path), checkpoints.load(reference.folder))
    head[3, 5] += 1
    save_file(stored | {"language_model.lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="the config ties them"):
        checkpoints.load(tmp_path)


def test_truncated_and_missing_files_are_named(saved, tmp_path):
    _, state = saved
    save_in_shards(state, CONFIG, tmp_path, tokens=TOKENS)
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{second.name} is truncated"):
        checkpoints.load(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second.name} is named by .* but is not there"):
        checkpoints.load(tmp_path)
    save_file({"other": np.zeros(1, np.float32)}, second)
    with pytest.raises(CheckpointError, match="does not match its files"):
        checkpoints.load(tmp_path)


def test_index_cannot_point_out_of_its_folder(saved, tmp_path):
    folder, _ = saved
    shutil.copy(folder / "config.json", tmp_path)
    index = {"weight_map": {"image_newline": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file of this folder"):
        checkpoints.load(tmp_path)


def test_pickled_weights_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        checkpoints.load(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="unpickling runs code"):
        checkpoints.load(tmp_path / "pytorch_model.bin", CONFIG)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoints.load(tmp_path / "nowhere", CONFIG)


def test_a_save_cut_off_leaves_the_earlier_checkpoint(saved, tmp_path, monkeypatch):
    _, state = saved
    checkpoints.save(state, CONFIG, tmp_path, tokens=TOKENS)
    calls = []

    def full_disk(ours, axes):
        calls.append(axes)
        if len(calls) == 20:
            raise OSError("no space left on device")
        return to_theirs(ours, axes)

    to_theirs = names.to_theirs
    monkeypatch.setattr(names, "to_theirs", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(random_state(CONFIG, seed=1), CONFIG, tmp_path, tokens=TOKENS)
    assert_same_state(checkpoints.load(tmp_path), state)


def test_saving_over_a_sharded_checkpoint_replaces_it_whole(saved, tmp_path):
    _, state = saved
    save_in_shards(random_state(CONFIG, 1), CONFIG, tmp_path, tokens=TOKENS)
    checkpoints.save(state, CONFIG, tmp_path, tokens=TOKENS)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert_same_state(checkpoints.load(tmp_path), state)


def test_save_refuses_what_does_not_fit(saved, tmp_path):
    _, state = saved
    with pytest.raises(ValueError, match=r"special token image=151646 .* vocabulary of 97"):
        checkpoints.save(state, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="layout 'onnx'"):
        checkpoints.save(state, CONFIG, tmp_path, tokens=TOKENS, layout="onnx")
    wide = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, mlp=64))
    with pytest.raises(ValueError, match="do not fit the config"):
        checkpoints.save(state, wide, tmp_path, tokens=TOKENS)


@pytest.mark.parametrize(
    "changes",
    [
        {"pinpoints": ()},  # the embedded sample: a single tile with a newline
        {"pinpoints": (), "newline": False},  # LLaVA-1.5
    ],
)
def test_single_view_models_come_back(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    state = random_state(config)
    checkpoints.save(state, config, tmp_path, tokens=TOKENS)
    assert checkpoints.config_from_folder(tmp_path) == config
    assert_same_state(checkpoints.load(tmp_path), state)


# config.json of neulab/Pangea-7B and neulab/Pangea-7B-hf: the keys that matter.
PANGEA_7B = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
}
PANGEA_7B_HF = {
    "model_type": "llava_next",
    "image_token_index": 151646,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 152128,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
}


def config_of(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return checkpoints.config_from_folder(tmp_path)


def test_config_of_both_published_folders(tmp_path):
    assert config_of(tmp_path, PANGEA_7B) == PangeaConfig()
    assert (
        config_of(
            tmp_path, PANGEA_7B | {"image_grid_pinpoints": str(PANGEA_7B["image_grid_pinpoints"])}
        )
        == PangeaConfig()
    )
    found = config_of(tmp_path, PANGEA_7B_HF)
    language = dataclasses.replace(LanguageConfig(), vocab_size=152128)
    swapped = tuple((h, w) for w, h in PINPOINTS)
    assert found == PangeaConfig(language=language, pinpoints=swapped)


def test_vocabulary_is_that_of_the_tensor(saved, tmp_path):
    folder, _ = saved
    shutil.copy(folder / "model.safetensors", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["vocab_size"] = 5
    assert config_of(tmp_path, values).language.vocab_size == 97


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "holds a list, not a JSON object"),
        (PANGEA_7B | {"hidden_size": "3584"}, "hidden_size is '3584', but only a positive number"),
        ({"model_type": "qwen2"}, "without mm_vision_tower is no LLaVA"),
        (PANGEA_7B | {"mm_vision_tower": "google/siglip"}, "mm_vision_tower is 'google/siglip'"),
        (PANGEA_7B | {"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        (PANGEA_7B | {"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        (PANGEA_7B | {"image_grid_pinpoints": "(1x1),...,(6x6)"}, "a list of pairs"),
        (
            PANGEA_7B | {"use_sliding_window": True, "sliding_window": 4096},
            "sliding_window is 4096",
        ),
        (PANGEA_7B | {"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_type is 'dynamic'"),
        (
            PANGEA_7B_HF | {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy is 'full'",
        ),
        (
            PANGEA_7B_HF | {"text_config": {"model_type": "gemma"}},
            "text_config.model_type is 'gemma', but only qwen2 or llama or mistral",
        ),
        (
            PANGEA_7B_HF | {"vision_config": {"hidden_act": "gelu"}},
            "vision_config.hidden_act is 'gelu'",
        ),
        (PANGEA_7B_HF | {"vision_feature_layer": [-2, -5]}, "only one layer is supported"),
    ],
)
def test_unsupported_configs_are_named(tmp_path, values, message):
    with pytest.raises(CheckpointError, match=f"config.json.*{message}".replace("(", r"\(")):
        config_of(tmp_path, values)
