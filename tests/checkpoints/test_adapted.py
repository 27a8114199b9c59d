"""Folders of peft are loaded as models: their weights and logits equal peft's own merge."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pangea_jax
from pangea_jax import assets, checkpoints
from pangea_jax.batch import Batch
from pangea_jax.checkpoints import AdapterFolder, CheckpointError, adapted, adapter, convert
from pangea_jax.data.reader import ReadingPolicy
from pangea_jax.model import LoraConfig
from pangea_jax.model import params as model_params

KINDS = {
    "every kind of layer": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "linear_1", "embed_tokens", "down_proj", "fc2"],
        "modules_to_save": ["lm_head"],
        "use_rslora": True,
        "bias": "all",
        "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"layers.1.mlp.down_proj": 2, "down_proj": 11},
    },
    "decoder alone": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": r".*language_model\..*\.(v_proj|gate_proj|o_proj)",
        "bias": "lora_only",
    },
    "some layers": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "layers_to_transform": [1],
        "modules_to_save": ["multi_modal_projector"],
    },
}


def make_adapter(reference, folder, kind):
    """Random adapters of peft on a copy of the reference; returns the model that peft reads from them."""
    import torch

    peft = pytest.importorskip("peft", reason="peft is in requirements-parity.txt")
    base = type(reference.model).from_pretrained(reference.folder).eval()
    values = dict(KINDS[kind])
    if values["target_modules"] == "all-linear":
        values["target_modules"] = ["q_proj", "k_proj", "up_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(**values))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    # Read again: the order of patterns is that of the file.
    base = type(reference.model).from_pretrained(reference.folder).eval()
    return peft.PeftModel.from_pretrained(base, folder)


@pytest.fixture(scope="module", params=KINDS)
def made(request, make_reference, tmp_path_factory):
    """(reference, folder with adapters, peft's merge as a state of our parameters, its logits)."""
    import torch

    reference = make_reference()
    folder = tmp_path_factory.mktemp("adapters")
    theirs = make_adapter(reference, folder, request.param)
    tokens = np.random.default_rng(0).integers(1, 90, (1, 20), np.int32)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(tokens).long()).logits.numpy()
    merged = tmp_path_factory.mktemp("merged")
    theirs.merge_and_unload().save_pretrained(merged)
    return reference, folder, checkpoints.load(merged), (tokens, logits)


def assert_close(found, wanted):
    found, wanted = model_params.flatten(found), model_params.flatten(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6, err_msg=name)


def test_weights_and_logits_equal_those_of_peft(made):
    reference, folder, merged, (tokens, wanted) = made
    found = checkpoints.resolve(folder)
    assert isinstance(found, AdapterFolder) and found.base == reference.folder
    assert_close(checkpoints.load(found), merged)
    config = dataclasses.replace(checkpoints.config_from_folder(folder), dtype="float32")
    model = checkpoints.load_model(folder, config)
    batch = Batch(
        tokens=jnp.asarray(tokens),
        image_index=jnp.full_like(tokens, -1),
        positions=jnp.arange(20)[None],
        segment_ids=jnp.ones_like(tokens),
        tiles=jnp.zeros((1, 1, 28, 28, 3), jnp.uint8),
    )
    logits = jax.jit(lambda model, batch: model(batch))(model, batch)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
    base = model_params.flatten(checkpoints.load(reference.folder))
    changed = model_params.flatten(checkpoints.load(found))
    assert any(np.abs(changed[name] - base[name]).max() > 0.01 for name in base)


def test_older_names_of_modules(made, tmp_path):
    """peft with transformers before 4.52 wrote the names of Pangea-7B-hf's tensors."""
    reference, folder, merged, _ = made
    older = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    tensors = {}
    for key, value in load_file(folder / adapted.WEIGHTS).items():
        name = key.removeprefix("base_model.model.")
        prefix = next(prefix for prefix in older if name.startswith(prefix))
        tensors[f"base_model.model.{older[prefix]}{name.removeprefix(prefix)}"] = value
    save_file(tensors, tmp_path / adapted.WEIGHTS)
    (tmp_path / adapted.CONFIG).write_text((folder / adapted.CONFIG).read_text())
    assert_close(checkpoints.load(checkpoints.resolve(tmp_path, reference.folder)), merged)


@pytest.fixture
def own(make_reference, tmp_path):
    """Our own adapters of rank 2 on the reference, and their parameters."""
    reference = make_reference()
    config = checkpoints.config_from_folder(reference.folder)
    random = np.random.default_rng(3)
    shapes = {"a_ir": (2, 32, 2), "b_ro": (2, 2, 48)}
    params = {
        f"language.blocks.gate_lora.{name}": random.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    lora = LoraConfig(rank=2, alpha=3.0, targets=("gate",))
    adapter.save(params, lora, tmp_path, base=str(reference.folder))
    return reference, config, tmp_path, params


def edit(folder, **changes):
    file = folder / adapted.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_our_own_adapters_come_back(own):
    reference, _, folder, params = own
    base = model_params.flatten(checkpoints.load(reference.folder))
    found = model_params.flatten(checkpoints.load(folder))
    a, b = (params[f"language.blocks.gate_lora.{name}"] for name in ("a_ir", "b_ro"))
    name = "language.blocks.gate_kernel_df"
    np.testing.assert_allclose(found[name], base[name] + 1.5 * (a @ b), atol=1e-5)
    same = set(base) - {name}
    assert all(np.array_equal(found[other], base[other]) for other in same)


def test_a_part_of_a_merged_parameter_is_that_part(own):
    _, config, folder, _ = own
    weights = checkpoints.folder.open_weights(folder, config)
    name, dtype = "language.blocks.gate_kernel_df", np.dtype(np.float32)
    whole = weights.read(name, (slice(None),) * 3, dtype)
    index = slice(1, 2), slice(3, 17), slice(5, 40)
    np.testing.assert_allclose(weights.read(name, index, dtype), whole[index], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported; merge the adapter"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', but only 'LORA' is supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': such an adapter also"),
        ({"r": 3}, "is (2, 32), but the model and adapter_config.json make it (3, 32)"),
        ({"r": None}, "r is None; expected a number"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path; give the model"),
        ({"base_model_name_or_path": "/nowhere"}, "holds adapters of /nowhere: there is no folder"),
        ({"revision": "v2"}, "names revision 'v2'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(own, changes, message):
    _, _, folder, _ = own
    edit(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(checkpoints.resolve(folder))
    assert message in str(error.value) and str(folder) in str(error.value)


def test_tensors_of_another_model_are_named(own):
    _, _, folder, _ = own
    tensors = load_file(folder / adapted.WEIGHTS)
    name = next(iter(tensors))
    save_file({name.replace("layers.", "blocks."): tensors[name]}, folder / adapted.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"blocks.*changes no parameter of this model"):
        checkpoints.load(folder)
    save_file({name: tensors[name]}, folder / adapted.WEIGHTS)
    with pytest.raises(CheckpointError, match="has no partner"):
        checkpoints.load(folder)


def test_pickled_adapters_and_a_base_for_a_whole_model_are_refused(own):
    reference, _, folder, _ = own
    (folder / "non_lora_trainables.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin holds pickled weights"):
        checkpoints.load(folder)
    (folder / adapted.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="pickled adapters"):
        checkpoints.load(folder)
    with pytest.raises(ValueError, match="is a whole model, so it takes no base"):
        checkpoints.resolve(reference.folder, "sample")


def test_adapters_of_the_sample_answer_and_are_converted(tmp_path):
    """The base is in the package, in two files; tokenizer and reading policy come from it and from the adapters."""
    config = checkpoints.config_from_folder(assets.SAMPLE_MODEL)
    lora = LoraConfig(rank=1, alpha=1.0, targets=("q",))
    C = config.language
    random = np.random.default_rng(0)
    shapes = {"a_ir": (C.layers, C.width, 1), "b_ro": (C.layers, 1, C.heads * C.head_width)}
    params = {
        f"language.blocks.q_lora.{name}": random.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    policy = ReadingPolicy(background=(1, 2, 3))
    adapter.save(params, lora, tmp_path / "adapter", base="sample", policy=policy)

    model = pangea_jax.load(tmp_path / "adapter")
    assert model.reader.policy == policy
    assert model.config.dtype == "float32"
    plain = pangea_jax.load("sample")
    assert np.abs(model.logits("Hii ni") - plain.logits("Hii ni")).max() > 0.1

    source = checkpoints.resolve(tmp_path / "adapter")
    files = checkpoints.tokenizer_files(source)
    tokenizer = checkpoints.load_tokenizer(source, files)
    convert.convert(source, tmp_path / "merged", tokenizer, tokenizer_files=files, form="hf")
    merged = model_params.flatten(checkpoints.load(tmp_path / "merged"))
    wanted = model_params.flatten(checkpoints.load(source))
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(merged[name], value, err_msg=name)
    assert checkpoints.load_policy(tmp_path / "merged") == policy
