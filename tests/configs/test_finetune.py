"""configs/finetune.py takes every size from the checkpoint, in each layout that load() reads."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from configs import finetune
from pangea_jax import checkpoints, experiment, sharding
from pangea_jax.checkpoints import adapter, convert
from pangea_jax.checkpoints import config as config_file
from pangea_jax.experiment import Experiment
from pangea_jax.model import LoraConfig, Pangea
from pangea_jax.model import params as model_params
from pangea_jax.sample import emoji
from pangea_jax.train import optimizer as optim
from pangea_jax.train.state import abstract_state
from pangea_jax.typed_config import build
from tests.checkpoints.tiny import random_state, write_run


def make(arg):
    return build(Experiment, finetune.get_config(arg))


@pytest.fixture(scope="module")
def folder(tiny_config, emoji_tokenizer, tmp_path_factory):
    """A small random model in the public layout, with the sample's vocabulary."""
    folder = tmp_path_factory.mktemp("public")
    language = dataclasses.replace(tiny_config.language, vocab_size=emoji_tokenizer.vocab_size)
    config = dataclasses.replace(tiny_config, language=language)
    tokens = checkpoints.SpecialTokens.of(emoji_tokenizer)
    checkpoints.save(random_state(config), config, folder, tokens=tokens)
    shutil.copy(emoji.DIRECTORY / emoji.TOKENIZER, folder)
    return folder


def llava(folder, to, monkeypatch):
    """The folder in the layout of neulab/Pangea-7B: its config.json names the tower without sizes."""
    config = checkpoints.config_from_folder(folder)
    tower = "openai/clip-vit-large-patch14-336"
    monkeypatch.setitem(config_file._TOWERS, tower, config.vision)
    tokens = checkpoints.SpecialTokens.of(checkpoints.load_tokenizer(folder))
    checkpoints.save(checkpoints.load(folder), config, to, layout="llava", tokens=tokens)
    values = json.loads((to / "config.json").read_text())
    content = values["text_config"] | {
        "model_type": "llava_qwen",
        "mm_vision_tower": tower,
        "mm_vision_select_layer": config.vision.feature_layer,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": config.pinpoints,
    }
    (to / "config.json").write_text(json.dumps(content))
    shutil.copy(emoji.DIRECTORY / emoji.TOKENIZER, to)
    return to


def ours(folder, to, _):
    files = checkpoints.tokenizer_files(folder)
    tokenizer = checkpoints.load_tokenizer(folder)
    convert.convert(folder, to / "ours", tokenizer, tokenizer_files=files)
    return to / "ours"


def run(folder, to, _):
    params = model_params.flatten(checkpoints.load(folder))
    return write_run(to, checkpoints.config_from_folder(folder), params)


def peft(folder, to, _):
    C, lora = checkpoints.config_from_folder(folder).language, LoraConfig(rank=2, targets=("q",))
    shapes = {"a_ir": (C.layers, C.width, 2), "b_ro": (C.layers, 2, C.heads * C.head_width)}
    params = {
        f"language.blocks.q_lora.{name}": np.zeros(size, np.float32)
        for name, size in shapes.items()
    }
    adapter.save(params, lora, to / "adapter", base=str(folder))
    return to / "adapter"


@pytest.mark.parametrize("make_form", [llava, ours, run, peft])
@pytest.mark.parametrize("lora", [0, 4])
def test_every_form_that_load_reads_is_fine_tuned(folder, tmp_path, monkeypatch, make_form, lora):
    """The same weights in another form give the same config, and the run starts from them."""
    where = make_form(folder, tmp_path, monkeypatch)
    exp = make(f"model={where},data=emoji,lora={lora},dtype=float32")
    wanted = make(f"model={folder},data=emoji,lora={lora},dtype=float32")
    assert (exp.model, exp.frozen, exp.pretrained) == (wanted.model, wanted.frozen, (str(where),))
    tokenizer = experiment.open_data(exp)[1]
    assert tokenizer.vocab_size == exp.model.language.vocab_size
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    found = experiment.load_initial(exp, mesh)
    below = model_params.flatten(checkpoints.load(folder))
    assert found.keys() == below.keys()
    for name, value in below.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("lora", [0, 4])
def test_sizes_tokenizer_and_reading_come_from_the_folder(folder, tiny_config, lora):
    exp = make(f"model={folder},data=emoji,lora={lora}")
    found = checkpoints.config_from_folder(folder)
    assert exp.model.vision == found.vision and exp.model.pinpoints == tiny_config.pinpoints
    assert dataclasses.replace(exp.model.language, lora=found.language.lora) == found.language
    assert exp.model.language.lora.rank == lora
    assert exp.pretrained == (str(folder),)
    assert exp.reading == checkpoints.load_policy(folder)
    assert (exp.pipeline.rows, exp.pipeline.packing) == (16, "none")
    names = model_params.abstract(lambda: Pangea(exp.model, rngs=nnx.Rngs(0)))[1]
    frozen = model_params.select(names, exp.frozen)
    assert all(("_lora." in name) != (name in frozen) for name in names) if lora else not frozen
    _, tokenizer = experiment.open_data(exp)
    assert tokenizer.vocab_size == found.language.vocab_size


def test_a_checkpoint_names_the_model_that_the_run_starts_from(folder):
    exp = make(f"model={folder},data=emoji,lora=2")
    assert exp.checkpoint.base == str(folder) == experiment.on_base(exp).checkpoint.base
    assert make(f"model={folder},data=emoji").checkpoint.base == ""
    other = dataclasses.replace(exp, init_from=str(checkpoints.folder.assets.SAMPLE_MODEL))
    assert experiment.on_base(other).checkpoint.base == other.init_from
    parts = dataclasses.replace(
        exp, pretrained=(f"{folder}:vision", f"{folder}:projector+language")
    )
    assert experiment.on_base(parts).checkpoint.base == ""


def test_its_weights_fit(folder):
    exp = make(f"model={folder},data=emoji,lora=2,dtype=float32")
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = experiment.load_initial(exp, mesh)
    wanted = model_params.flatten(checkpoints.load(folder))
    assert params.keys() == wanted.keys()


def test_adapters_are_a_model_and_a_run_that_trains_them_is_none(folder, tmp_path):
    config = checkpoints.config_from_folder(folder)
    lora = LoraConfig(rank=2, targets=("q",))
    C = config.language
    shapes = {"a_ir": (C.layers, C.width, 2), "b_ro": (C.layers, 2, C.heads * C.head_width)}
    params = {
        f"language.blocks.q_lora.{name}": np.ones(size, np.float32) for name, size in shapes.items()
    }
    adapter.save(params, lora, tmp_path / "adapter", base=str(folder))
    exp = make(f"model={tmp_path / 'adapter'},data=emoji,dtype=float32")
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    found = experiment.load_initial(exp, mesh)["language.blocks.q_kernel_dhc"]
    below = model_params.flatten(checkpoints.load(folder))["language.blocks.q_kernel_dhc"]
    np.testing.assert_allclose(found, below + 16.0, rtol=1e-5)  # 8 times two products of ones
    adapted = dataclasses.replace(config, language=dataclasses.replace(C, lora=lora))
    content = {"model": dataclasses.asdict(adapted), "data": {"tokenizer": "emoji"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is a run that trains adapters; give its folder model/"):
        make(f"model={tmp_path / 'run'},data=emoji")


def test_the_sample_is_a_model_too():
    exp = make("model=sample,data=emoji")
    assert exp.pretrained == ("tower", "model") and exp.model.dtype == "float32"
    assert exp.model == dataclasses.replace(
        checkpoints.config_from_folder(checkpoints.folder.assets.SAMPLE_MODEL),
        dtype="float32",
        language=exp.model.language,
    )


def test_a_row_has_places_for_eight_pictures_without_anyres_and_for_all_tiles_with_it(folder):
    """The tower computes every place of a row, also the empty ones."""
    assert make("model=sample,data=emoji").pipeline.row_tiles == 8
    exp = make(f"model={folder},data=emoji")
    assert exp.model.pinpoints
    assert exp.pipeline.row_tiles * exp.model.vision.patches > exp.pipeline.row_tokens


MISTAKES = {
    "lora=abc": "lora='abc': expected a value of type int",
    "lora=-1": "lora=-1: expected 0 or more",
    "epochs=0": "epochs=0: expected 1 or more",
    "batch=0": "batch=0: expected 1 or more",
    "dtype=int8": "dtype='int8' is not one of",
    "lora_alpha=8": "'lora_alpha' is not one of .* did you mean 'lora'",
    "data=emoji": "data= stands twice",
}


def test_what_cannot_be_fine_tuned_is_refused_by_name(folder, tmp_path):
    with pytest.raises(ValueError, match="data= is missing"):
        make("model=sample")
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        make("model=nowhere,data=emoji")
    for wrong, message in MISTAKES.items():
        with pytest.raises(ValueError, match=message):
            make(f"model=sample,data=emoji,{wrong}")
    with pytest.raises(FileNotFoundError, match=r"config argument model=.*: no config.json in"):
        make(f"model={tmp_path},data=emoji")
    exp = dataclasses.replace(make(f"model={folder},data=emoji,lora=4"), init_from=str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"--init_from=.*: no config.json .* a finished run"
    ):
        experiment.load_initial(exp, None)
    sample = str(checkpoints.folder.assets.SAMPLE_MODEL)
    with pytest.raises(
        checkpoints.CheckpointError, match=r"has language\.width 128, but .* has 32; start"
    ):
        experiment.load_initial(dataclasses.replace(exp, init_from=sample), None)
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(checkpoints.CheckpointError, match=r"rope_scaling\.rope_type is 'dynamic'"):
        make(f"model={tmp_path},data=emoji")


def test_a_base_in_4_bits_trains_adapters_alone(folder):
    """Its step has the FLOPs of the same step on the base as it is."""
    exp = make(f"model={folder},data=emoji,lora=2,weights=nf4")
    plain = make(f"model={folder},data=emoji,lora=2")
    shapes = [
        model_params.abstract(lambda one=one: Pangea(one.model, rngs=nnx.Rngs(0)))[1]
        for one in (exp, plain)
    ]
    name = "language.blocks.up_kernel_df"
    assert shapes[0][f"{name}.codes"].dtype == np.uint8 and shapes[1][name].ndim == 3
    trained = set(shapes[0]) - model_params.select(shapes[0], exp.frozen)
    assert trained and all("_lora." in name for name in trained)
    counts = [experiment.step_flops(one, s, 1) for one, s in zip((exp, plain), shapes, strict=True)]
    assert counts[0] == counts[1]
    with pytest.raises(ValueError, match="weights in int8 do not train; add adapters with"):
        make(f"model={folder},data=emoji,weights=int8")
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    optimizer = optim.make_optimizer(exp.optimizer, 2)
    with pytest.raises(ValueError, match=r"codes is in nf4, which does not train: add adapters"):
        abstract_state(exp.model, optimizer, mesh)
