"""Conversion between the public layouts and our own form, and its errors."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

from pangea_jax import checkpoints
from pangea_jax.checkpoints import (
    CheckpointError,
    SpecialTokens,
    convert,
    huggingface,
    names,
    orbax,
)
from pangea_jax.checkpoints.huggingface import abstract_state, shapes_of
from pangea_jax.data.reader import ReadingPolicy
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.model.params import flatten
from pangea_jax.sample import emoji
from pangea_jax.train.resume import Checkpoints
from pangea_jax.train.state import TrainState
from tests.checkpoints.tiny import (
    assert_same_state,
    random_state,
    save_in_shards,
    tensors,
    with_language,
)

TOKENIZER = emoji.DIRECTORY / emoji.TOKENIZER
CONFIG = with_language(vocab_size=5201)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def state():
    return random_state(CONFIG)


@pytest.fixture(scope="module")
def public(state, tokenizer, tmp_path_factory):
    """A folder in the -hf layout with several files and its tokenizer."""
    folder = tmp_path_factory.mktemp("public")
    tokens = SpecialTokens.of(tokenizer)
    save_in_shards(state, CONFIG, folder, tokens=tokens, max_bytes=200_000)
    shutil.copy(TOKENIZER, folder)
    return folder


@pytest.fixture
def run(tokenizer, monkeypatch):
    """`convert` with parts so small that every large tensor has several."""
    monkeypatch.setattr(convert, "PART_BYTES", 20_000)

    def call(source, target, **kwargs):
        return convert.convert(
            Path(source), Path(target), tokenizer, tokenizer_files=TOKENIZER, **kwargs
        )

    return call


@pytest.fixture
def ours(public, run, tmp_path):
    folder = tmp_path / "ours"
    run(public, folder)
    return folder


def assert_same_bytes(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("layout", convert.LAYOUTS)
def test_to_orbax_and_back_is_byte_equal(public, ours, run, tmp_path, layout):
    run(ours, tmp_path / "back", form="hf", layout=layout)
    found = tensors(tmp_path / "back")
    if layout == "transformers-5":
        old, new = "vision_tower.", "vision_tower.vision_model."
        found = {new + k[len(old) :] if k.startswith(old) else k: v for k, v in found.items()}
    assert_same_bytes(found, tensors(public))
    assert checkpoints.config_from_folder(tmp_path / "back") == CONFIG


@pytest.mark.parametrize("form", convert.FORMATS)
@pytest.mark.parametrize(
    "policy", [ReadingPolicy(), ReadingPolicy(background=(1, 2, 3), multi_image="padded")]
)
def test_the_reading_policy_goes_along(public, run, tmp_path, form, policy):
    """An imported model gets the reference's; a model of ours keeps its own."""
    source = public
    if policy != ReadingPolicy():
        source = shutil.copytree(public, tmp_path / "source")
        policy.save(source)
    run(source, tmp_path / "target", form=form)
    assert (tmp_path / "target" / "reading.json").is_file()
    assert checkpoints.load_policy(tmp_path / "target") == policy


@pytest.mark.parametrize(("decoder", "tied"), [("qwen2", False), ("qwen2", True), ("llama", True)])
def test_transformers_loads_what_comes_back(make_reference, tmp_path, tokenizer, decoder, tied):
    import torch
    import transformers

    reference = make_reference(decoder, tied)
    letters = dataclasses.make_dataclass("Ids", ["image_id", "im_end_id", "pad_id", "vocab_size"])

    class Model(type(tokenizer)):
        """The sample's tokenizer with the ids of the reference's 97 tokens."""

        def __init__(self):
            self.__dict__ |= dataclasses.asdict(letters(96, 1, 0, 97))

    for source, target, form in (
        (reference.folder, tmp_path / "ours", "orbax"),
        (tmp_path / "ours", tmp_path / "back", "hf"),
    ):
        convert.convert(source, target, Model(), tokenizer_files=TOKENIZER, form=form)
    model, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()), report
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, reference.model(ids).logits)


def test_parts_are_small_and_cover_everything(state):
    """No part is too large, and together the parts are every tensor once, in order."""
    shapes = shapes_of(CONFIG)
    for entry in names.entries(shapes, CONFIG, names.LAYOUTS["llava"]):
        whole, seen = np.asarray(flatten(state)[entry.path]), {}
        for name, index in entry.blocks(4, 1000):
            part = whole[index]
            row = whole.size // len(entry.names) // entry.shape[entry.major_axis]
            assert part.nbytes <= 1000 + 4 * row
            part = part[0] if entry.stacked else part
            seen.setdefault(name, []).append(names.to_theirs(part, entry.axes).reshape(-1))
        for layer, name in enumerate(entry.names):
            expected = names.to_theirs(whole[layer] if entry.stacked else whole, entry.axes)
            np.testing.assert_array_equal(np.concatenate(seen[name]), expected.reshape(-1))


def test_orbax_itself_reads_our_form(ours, state):
    read = ocp.load(ours / "params")
    assert_same_state(nnx.State({}) if read is None else _unflat(read), state)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        k: jax.ShapeDtypeStruct(v, jnp.bfloat16, sharding=device)
        for k, v in shapes_of(CONFIG).items()
    }
    narrow = ocp.load(ours / "params", wanted)
    assert_same_state(_unflat(narrow), jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))


def _unflat(params):
    from pangea_jax.model.params import unflatten

    return unflatten({name: jnp.asarray(value) for name, value in params.items()})


def test_our_form_loads_onto_shardings_and_casts(ours, state):
    assert checkpoints.config_from_folder(ours) == CONFIG
    assert_same_state(checkpoints.load(ours), state)
    model = checkpoints.load_model(ours)
    np.testing.assert_array_equal(model.newline_d[...], state["newline_d"][...])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))

    def sharding(value):
        axis = next((i for i, n in enumerate(value.shape) if n % 2 == 0), None)
        spec = ["model" if i == axis else None for i in range(len(value.shape))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    targets = jax.tree.map(sharding, abstract_state(CONFIG))
    found = checkpoints.load(ours, shardings=targets, dtype=jnp.bfloat16)
    assert {p: v.sharding for p, v in flatten(found).items()} == flatten(targets)
    assert_same_state(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    tower = checkpoints.load(ours, only=("vision",))
    assert set(tower) == {"vision"}


def test_a_training_run_becomes_a_public_folder(state, run, tmp_path):
    """It takes trained and frozen parameters of the newest step, but not the optimiser."""
    params = flatten(state)
    frozen = {k: v.astype(jnp.bfloat16) for k, v in params.items() if k.startswith("vision.")}
    trainable = {k: v for k, v in params.items() if k not in frozen}
    config = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    (tmp_path / "run").mkdir()
    content = {"model": config, "data": {"tokenizer": "emoji"}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    saved = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    moments = optax.sgd(0.1, momentum=0.9).init(trainable)
    for step, scale in ((9, 0.0), (10, 1.0)):
        now = {k: scale * v for k, v in trainable.items()}
        saved.save(TrainState(jnp.int32(step), now, frozen, moments), iter(_Data()), {"train": 1.0})
    saved.close()

    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "10"):
        assert checkpoints.config_from_folder(source) == CONFIG
        assert_same_state(checkpoints.load(source), _unflat(trainable | frozen))
    assert checkpoints.load_tokenizer(tmp_path / "run").vocab_size == 5200
    run(tmp_path / "run", tmp_path / "hf", form="hf", dtype=np.dtype("float32"))
    widened = {k: v.astype(jnp.float32) for k, v in (trainable | frozen).items()}
    assert_same_state(checkpoints.load(tmp_path / "hf"), _unflat(widened))


class _Data:
    """An iterator that Orbax saves by its state, as it saves Grain's."""

    def __iter__(self):
        import grain

        return iter(grain.MapDataset.range(3).to_iter_dataset())


def test_casting_on_the_way(public, state, run, tmp_path):
    run(public, tmp_path / "narrow", dtype=jnp.dtype("bfloat16"))
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    assert_same_state(checkpoints.load(tmp_path / "narrow"), expected)
    assert (
        json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    )


def test_progress_adds_up(public, run, tmp_path):
    seen = []
    run(public, tmp_path / "ours", progress=lambda done, total: seen.append((done, total)))
    total = sum(value.nbytes for value in tensors(public).values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert len(seen) > 100
    assert seen == sorted(seen)


@pytest.mark.parametrize("form", convert.FORMATS)
def test_cut_off_leaves_nothing_that_loads_and_starts_again(
    public, run, tmp_path, form, monkeypatch
):
    target, calls = tmp_path / "out", []

    def full_disk(*args, real=huggingface.cast):
        calls.append(args)
        if len(calls) == 50:
            raise OSError("no space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "cast", full_disk)
        with pytest.raises(OSError, match="no space"):
            run(public, target, form=form)
    assert not target.exists()
    with pytest.raises(FileNotFoundError, match=r"no (config|model)\."):
        checkpoints.load(tmp_path / "out.partial")
    run(public, target, form=form)
    assert_same_state(checkpoints.load(target), checkpoints.load(public))
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(FileExistsError, match="is there already"):
        run(public, target, form=form)


def damaged(ours, do):
    chunk = max(
        (ours / "params").rglob("language.embedding_vd/c/*/*"), key=lambda f: f.stat().st_size
    )
    do(chunk)
    return ours


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[7] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (flip, "language.embedding_vd is damaged or incomplete .*Digest mismatch"),
        (lambda file: file.write_bytes(file.read_bytes()[:40]), "is damaged or incomplete"),
        (lambda file: file.unlink(), "is damaged or incomplete .*missing"),
    ],
)
def test_damage_to_our_form_is_found(ours, run, tmp_path, do, message):
    with pytest.raises(CheckpointError, match=message):
        run(damaged(ours, do), tmp_path / "hf", form="hf")
    assert not (tmp_path / "hf").exists()


def test_our_form_must_fit_its_config(ours):
    shutil.rmtree(ours / "params" / "state" / "newline_d")
    with pytest.raises(CheckpointError, match="newline_d cannot be opened"):
        checkpoints.load(ours)
    metadata = ours / "params" / "state" / "_METADATA"
    content = json.loads(metadata.read_text())
    del content["tree_metadata"]["('newline_d',)"]
    metadata.write_text(json.dumps(content))
    values = json.loads((ours / "config.json").read_text())
    values["text_config"]["intermediate_size"] = 64
    (ours / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(ours)
    assert "missing 1: newline_d" in str(caught.value)
    assert "gate_kernel_df is (2, 32, 48), the config says (2, 32, 64)" in str(caught.value)
    metadata.write_text("{}")
    with pytest.raises(CheckpointError, match="is no metadata of Orbax"):
        checkpoints.load(ours)


def test_bad_sources_are_named_before_anything_is_written(public, run, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(public, source)
    shards = sorted(source.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is truncated"):
        run(source, tmp_path / "out")
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is named by .* but is not there"):
        run(source, tmp_path / "out")
    shards[1].write_bytes(whole)
    head = next(f for f in shards if "language_model.lm_head.weight" in load_file(f))
    content = load_file(head)
    content["language_model.lm_head.weight"] = content["language_model.lm_head.weight"][:-1]
    save_file(content, head)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \(5200, 32\).*\(5201, 32\)"):
        run(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_vocabulary_must_be_the_models(public, tokenizer, tmp_path):
    small = dataclasses.replace(
        CONFIG, language=dataclasses.replace(CONFIG.language, vocab_size=1000)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), abstract_state(small))
    tokens = SpecialTokens.of(tokenizer)
    checkpoints.save(zeros, small, tmp_path / "small", tokens=tokens)
    with pytest.raises(CheckpointError, match="tokenizer has 5200 tokens, the embedding only 1000"):
        convert.convert(tmp_path / "small", tmp_path / "x", tokenizer, tokenizer_files=TOKENIZER)
    shutil.copytree(public, tmp_path / "other")
    values = json.loads((public / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(values | {"image_token_index": 77}))
    with pytest.raises(CheckpointError, match="<image> at 77, the tokenizer at 4"):
        convert.convert(tmp_path / "other", tmp_path / "x", tokenizer, tokenizer_files=TOKENIZER)


def test_quantised_weights_are_refused(public, run, tmp_path):
    shutil.copytree(public, tmp_path / "source")
    file = next((tmp_path / "source").glob("*.safetensors"))
    content = load_file(file)
    name = next(iter(content))
    save_file(content | {name: content[name].astype(np.int8)}, file)
    with pytest.raises(CheckpointError, match=f"tensor {name} is I8, but only F32, F16, BF16"):
        run(tmp_path / "source", tmp_path / "out")


def test_layers_of_different_types_need_a_choice(public, run, tmp_path):
    """Values are rounded only on request."""
    shutil.copytree(public, tmp_path / "source")
    name = "language_model.model.layers.1.self_attn.q_proj.bias"
    for file in (tmp_path / "source").glob("*.safetensors"):
        content = load_file(file)
        if name in content:
            save_file(content | {name: content[name].astype(jnp.bfloat16)}, file)
    for read in (checkpoints.load, lambda folder: run(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=f"{name} is bfloat16, .*choose a dtype for all"):
            read(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out", dtype=np.dtype("float32"))


def test_resolve_returns_folders_and_says_what_to_do_without_a_network(tmp_path, monkeypatch):
    import huggingface_hub

    assert checkpoints.resolve(tmp_path) == tmp_path
    for name in ("nowhere", "../a/b", "/a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="not a hub name"):
            checkpoints.resolve(name)
    fetched = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: fetched.append((name, allow_patterns)) or str(tmp_path),
    )
    assert checkpoints.resolve("neulab/Pangea-7B-hf") == tmp_path
    ((name, patterns),) = fetched
    assert name == "neulab/Pangea-7B-hf"
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith(".bin") for pattern in patterns)

    def offline(*_args, **_kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the requested files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        CheckpointError, match=r"without a network, download it elsewhere .*pass the folder"
    ):
        checkpoints.resolve("neulab/Pangea-7B-hf")


def test_find_prefers_the_newest_whole_step(tmp_path):
    for step in ("9", "10", "11.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step / "state").mkdir(parents=True)
        (tmp_path / "checkpoints" / step / "state" / "_METADATA").write_text("{}")
    assert orbax.find(tmp_path).arrays == tmp_path / "checkpoints" / "10" / "state"
    assert orbax.find(tmp_path).config == tmp_path / "config.json"
    assert orbax.find(tmp_path / "checkpoints" / "9").config == tmp_path / "config.json"
    assert orbax.find(tmp_path / "nowhere") is None


def test_find_takes_a_step_from_within_its_folder(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "9" / "state").mkdir(parents=True)
    (tmp_path / "checkpoints" / "9" / "state" / "_METADATA").write_text("{}")
    for place, name in (
        ("", "."),
        ("checkpoints", "."),
        ("checkpoints", "9"),
        ("checkpoints/9", "."),
    ):
        monkeypatch.chdir(tmp_path / place)
        found = orbax.find(name)
        assert found.config == tmp_path / "config.json", (place, name)
        assert found.arrays == tmp_path / "checkpoints" / "9" / "state"
