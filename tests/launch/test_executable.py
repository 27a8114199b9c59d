"""launch/compile.py writes a step and launch/train.py runs it. A file with another step is refused."""

import dataclasses
import importlib.metadata
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launch import common, executable
from pangea_jax import sharding
from tests.launch.conftest import call

STEPS = 4


def test_a_run_on_a_compiled_step_is_the_run(tmp_path, runs):
    """On 8 devices, with all parameters trained. The loaded step is not compiled and learns the same."""
    file = tmp_path / "step.zip"
    config = f"--config=tests/launch/tiny.py:steps={STEPS}"
    flags = ("--topology=cpu:8", f"--steps={STEPS}", config, f"--output={file}")
    done = call("launch/compile.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded, compiled = tmp_path / "loaded", tmp_path / "compiled"
    options = dict(steps=STEPS, devices=8, JAX_LOG_COMPILES="1")
    said = [
        runs.finish(loaded, f"--executable={file}", **options),
        runs.finish(compiled, **options),
    ]
    assert ["XLA compilation of jit(step)" in text for text in said] == [False, True]
    for mine, theirs in zip(runs.metrics(loaded), runs.metrics(compiled), strict=True):
        assert mine["data/digest"] == theirs["data/digest"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    states = [runs.state(folder, STEPS) for folder in (loaded, compiled)]
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def make_step(factor=1.0):
    def step(state, batch):
        total = jnp.sum(batch["x"] @ state["w"])
        return {"w": state["w"] - factor * total}, {"loss": total}

    return step


def plan(mesh, factor=1.0, width=16):
    """A step, and the shapes and shardings of its arguments."""
    placed = {"w": NamedSharding(mesh, P("fsdp"))}
    rows = NamedSharding(mesh, sharding.BATCH_SPEC)
    step = jax.jit(
        make_step(factor),
        in_shardings=(placed, rows),
        out_shardings=(placed, NamedSharding(mesh, P())),
        donate_argnums=0,
    )
    state = {"w": jax.ShapeDtypeStruct((width,), jnp.float32, sharding=placed["w"])}
    batch = {"x": jax.ShapeDtypeStruct((8, width), jnp.float32, sharding=rows)}
    return step, (state, batch)


@dataclasses.dataclass(frozen=True)
class Config:
    title: str = "one"
    keep: str = "none"


CONFIG = Config()


@pytest.fixture
def mesh():
    return sharding.make_mesh(1, 8, 1)


@pytest.fixture
def no_compile_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def file(tmp_path, mesh, no_compile_cache):
    step, arguments = plan(mesh)
    lowered = step.lower(*arguments)
    executable.save(tmp_path / "step.zip", lowered, lowered.compile(), mesh, CONFIG, STEPS)
    return tmp_path / "step.zip"


def values(mesh):
    _, (state, batch) = plan(mesh)
    random = np.random.default_rng(0)
    w = jax.device_put(random.normal(size=16).astype(np.float32), state["w"].sharding)
    x = jax.device_put(random.normal(size=(8, 16)).astype(np.float32), batch["x"].sharding)
    return {"w": w}, {"x": x}


def test_the_loaded_step_computes_and_donates(file, mesh):
    step = executable.load(file, *plan(mesh), mesh, CONFIG, STEPS)
    state, batch = values(mesh)
    w, x = np.asarray(state["w"]), np.asarray(batch["x"])
    new, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], (x @ w).sum(), rtol=1e-5)
    np.testing.assert_allclose(new["w"], w - (x @ w).sum(), rtol=1e-5)
    assert state["w"].is_deleted() and not batch["x"].is_deleted()
    assert new["w"].sharding == NamedSharding(mesh, P("fsdp"))
    np.testing.assert_allclose(
        step(new, batch)[1]["loss"], (x @ (w - (x @ w).sum())).sum(), rtol=1e-4
    )


def test_what_changes_no_program_is_allowed(file, mesh):
    assert executable.load(file, *plan(mesh), mesh, Config(title="another"), STEPS)


def refusal(file, mesh, config=CONFIG, steps=STEPS, **changed):
    with pytest.raises(common.UserError, match="holds another program") as error:
        executable.load(file, *plan(mesh, **changed), mesh, config, steps)
    return str(error.value)


def test_another_program_is_refused_by_what_made_it_so(file, mesh):
    said = refusal(file, mesh, Config(keep="qkv"), steps=7, factor=2.0)
    assert "config.keep is 'none' there and 'qkv' here; config.steps is 4 there and 7 here" in said
    assert "compiled from other code" in refusal(file, mesh, factor=2.0)
    assert "compiled from other code" in refusal(file, mesh, width=32)


def lowered_kernel(factor, lines=0):
    """The text of a TPU program with one Pallas kernel, whose code starts after `lines` empty lines in its file."""
    code = ("\n" * lines) + "def kernel(x, out):\n    out[...] = x[...] * factor\n"
    names = {"factor": factor}
    exec(compile(code, f"machine{lines}/site-packages/kernel.py", "exec"), names)
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    step = jax.jit(pl.pallas_call(names["kernel"], shape))
    return step.trace(shape).lower(lowering_platforms=("tpu",)).as_text()


def test_where_a_kernel_was_traced_is_no_part_of_a_program():
    here, there, other = lowered_kernel(2.0), lowered_kernel(2.0, lines=5), lowered_kernel(3.0)
    assert here != there
    assert executable.without_locations(here) == executable.without_locations(there)
    assert executable.without_locations(here) != executable.without_locations(other)


def test_other_devices_are_refused(file):
    said = refusal(file, sharding.make_mesh(2, 4, 1))
    assert (
        "devices.mesh.data is 1 there and 2 here; devices.mesh.fsdp is 8 there and 4 here" in said
    )
    turned = jax.sharding.Mesh(np.array(jax.devices()[::-1]).reshape(1, 8, 1), sharding.AXES)
    assert "devices.order is" in refusal(file, turned)
    assert "devices.grid is [8] there and [4] here" in refusal(
        file, sharding.make_mesh(1, 4, 1, devices=jax.devices()[:4])
    )


def test_other_versions_are_refused(file, mesh, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.9" if name == "jaxlib" else version(name)
    )
    assert f"versions.jaxlib is {version('jaxlib')!r} there and '0.9' here" in refusal(file, mesh)


def test_what_is_no_such_file_is_refused(tmp_path, file, mesh):
    torn = tmp_path / "torn.zip"
    torn.write_bytes(file.read_bytes()[:-40])
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("facts.json", json.dumps({}))
    for path in (torn, other):
        with pytest.raises(common.UserError, match=r"launch/compile.py --output did not write"):
            executable.load(path, *plan(mesh), mesh, CONFIG, STEPS)


def test_arguments_that_lie_elsewhere_are_refused(file, mesh):
    step = executable.load(file, *plan(mesh), mesh, CONFIG, STEPS)
    state, batch = values(mesh)
    with pytest.raises(ValueError, match=r"the compiled step takes .*float32.16"):
        step({"w": jax.device_put(state["w"], NamedSharding(mesh, P()))}, batch)
    with pytest.raises(ValueError, match=r"the compiled step takes .*, not"):
        step(state, {"x": batch["x"].astype(jnp.bfloat16)})
    with pytest.raises(ValueError, match="the compiled step takes PyTreeDef"):
        step(state, {"y": batch["x"]})
