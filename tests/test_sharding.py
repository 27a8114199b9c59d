import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pangea_jax import sharding
from pangea_jax.model import Pangea, PangeaConfig, lora
from pangea_jax.model import params as model_params
from pangea_jax.train import optimizer as optim
from pangea_jax.train.state import init_state


@pytest.fixture(scope="module")
def full_size():
    """Names and shapes of Pangea-7B, without allocating it."""
    return model_params.abstract(lambda: Pangea(PangeaConfig(), rngs=nnx.Rngs(0)))[1]


def size(leaf):
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def test_the_full_model_has_the_published_size(full_size):
    # Qwen2-7B-Instruct, CLIP ViT-L/14-336, the projector and the newline vector.
    projector = 1024 * 3584 + 3584 + 3584**2 + 3584
    expected = 7_615_616_512 + 303_507_456 + projector + 3584
    assert sum(math.prod(leaf.shape) for leaf in full_size.values()) == expected


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 512, 1), (4, 64, 4)])
def test_every_parameter_of_the_full_model_has_a_place(full_size, sizes):
    mesh = AbstractMesh(sizes, sharding.AXES)
    shardings = sharding.param_shardings(full_size, mesh)
    assert shardings.keys() == full_size.keys()
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    local = sum(
        math.prod(shardings[name].shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for name, leaf in full_size.items()
    )
    total = sum(map(size, full_size.values()))
    # Everything except norms, biases and single vectors is split into `split` pieces.
    assert total / split <= local <= total / split + 0.02 * total
    if split > 1:
        whole = [name for name, s in shardings.items() if s.is_fully_replicated]
        assert sum(size(full_size[name]) for name in whole) <= 0.02 * total


def test_the_layer_axis_is_never_split(full_size):
    mesh = AbstractMesh((2, 2, 2), sharding.AXES)
    for name, placed in sharding.param_shardings(full_size, mesh).items():
        if "blocks." in name and placed.spec:
            assert placed.spec[0] is None, name


def test_every_rule_is_used(full_size):
    names = [*full_size, "vision.tail_blocks.q_kernel_dhc"]
    names += [f"language.blocks.{t}_lora.{x}" for t in lora.TARGETS for x in ("a_ir", "b_ro")]
    for pattern, _ in sharding.RULES:
        assert model_params.select(names, [pattern]), pattern


def test_a_parameter_without_a_rule_is_an_error():
    mesh = AbstractMesh((1, 8, 1), sharding.AXES)
    with pytest.raises(ValueError, match=r"no sharding rule matches parameter 'language\.gate_dh'"):
        sharding.spec("language.gate_dh", (8, 8), mesh)


def test_an_axis_that_does_not_divide_is_an_error(full_size):
    mesh = AbstractMesh((1, 5, 1), sharding.AXES)
    with pytest.raises(ValueError, match=r"head_kernel_dv.*dimension 0 .* 5 devices .*'fsdp'"):
        sharding.spec("language.head_kernel_dv", (3584, 152064), mesh)
    with pytest.raises(ValueError, match=r"k_bias_kc.*dimension 1 .* 8 devices .*'tensor'"):
        sharding.param_shardings(full_size, AbstractMesh((1, 1, 8), sharding.AXES))


def test_too_many_replicated_bytes_are_an_error():
    shapes = {
        "language.head_kernel_dv": jax.ShapeDtypeStruct((64, 64), jnp.float32),
        "newline_d": jax.ShapeDtypeStruct((64,), jnp.float32),
    }
    assert sharding.param_shardings(shapes, AbstractMesh((1, 8, 1), sharding.AXES))
    shapes["language.final_norm.scale"] = jax.ShapeDtypeStruct((64,), jnp.float32)
    with pytest.raises(ValueError, match=r"3\.0% of the parameter bytes are replicated"):
        sharding.param_shardings(shapes, AbstractMesh((1, 8, 1), sharding.AXES))
    # With data parallelism alone, parameters must be replicated.
    assert sharding.param_shardings(shapes, AbstractMesh((8, 1, 1), sharding.AXES))


@pytest.mark.parametrize(
    ("asked", "made"),
    [((1, -1, 1), (1, 8, 1)), ((2, 2, -1), (2, 2, 2)), ((-1, 4, 2), (1, 4, 2)), ((8, 1, 1),) * 2],
)
def test_make_mesh_fills_the_devices(asked, made):
    mesh = sharding.make_mesh(*asked)
    assert tuple(mesh.shape.values()) == made
    assert mesh.axis_names == sharding.AXES


@pytest.mark.parametrize(
    "asked", [(1, 4, 1), (3, -1, 1), (16, 1, 1), (-1, 0, 1), (-2, -4, 1), (-1, -8, 1)]
)
def test_a_mesh_that_does_not_fill_the_devices_is_an_error(asked):
    with pytest.raises(ValueError, match="does not fill the 8 devices"):
        sharding.make_mesh(*asked)


def test_only_one_axis_can_be_left_open():
    with pytest.raises(ValueError, match="only one axis may be -1"):
        sharding.make_mesh(-1, -1, 1)


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU device in JAX."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def fake_slices(count, side=4, platform="tpu"):
    """Chips of `count` v5e slices of side x side, the last slice first."""
    devices = [
        Chip(100_000 * index + side * y + x, index, (x, y, 0), platform)
        for index in range(count)
        for y in range(side)
        for x in range(side)
    ]
    return devices[::-1]


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((2, -1, 1), (2, 16, 1)),
        ((4, -1, 1), (4, 8, 1)),
        ((-1, 8, 2), (2, 8, 2)),
        ((-1, 2, 2), (8, 2, 2)),
    ],
)
def test_only_the_data_axis_leaves_a_slice(asked, made):
    mesh = sharding.make_mesh(*asked, devices=fake_slices(2))
    assert tuple(mesh.shape.values()) == made and mesh.axis_names == sharding.AXES
    slice_of = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slice_of == slice_of[:, :1, :1]).all()
    # The first half of `data` is one slice, the second the other: rows of a slice are neighbours.
    half = made[0] // 2
    assert (slice_of[:half] == 0).all() and (slice_of[half:] == 1).all()
    assert len({device.id for device in mesh.devices.flat}) == 32


def test_neighbours_on_the_mesh_are_neighbours_in_their_slice():
    for ring in sharding.make_mesh(2, 4, 4, devices=fake_slices(2)).devices.reshape(-1, 4):
        places = np.array([device.coords for device in ring])
        # One hop from each device to the next, and back to the first if the chips form a ring.
        assert (np.abs(np.diff(places, axis=0)).sum(1) == 1).all()


@pytest.mark.parametrize(("slices", "asked"), [(2, (1, -1, 1)), (2, (1, 16, 2)), (3, (1, 16, 3))])
def test_a_mesh_that_lays_parameters_over_slices_is_an_error(slices, asked):
    with pytest.raises(
        ValueError, match=rf"are {slices} TPU slices.*--config\.mesh\.data={slices} .*16 chips"
    ):
        sharding.make_mesh(*asked, devices=fake_slices(slices))


def fake_hosts(kind, slices=1):
    """Chips of slices of 8 x 8, whose hosts have 2 x 2 each."""
    return [
        dataclasses.replace(
            chip,
            device_kind=kind,
            process_index=16 * chip.slice_index + 4 * (chip.coords[1] // 2) + chip.coords[0] // 2,
        )
        for chip in fake_slices(slices, side=8)
    ]


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize(
    ("data", "tensor", "slices"), [(1, 1, 1), (1, 2, 1), (2, 2, 2), (1, 4, 1), (4, 4, 2)]
)
def test_a_row_lies_within_one_process(kind, data, tensor, slices):
    """Each process reads its own rows. If a row were split over processes, its tokens would be wrong."""
    devices = fake_hosts(kind, slices)
    grid = sharding.make_mesh(data, -1, tensor, devices=devices).devices
    assert set(grid.flat) == set(devices)
    process_of = np.vectorize(lambda device: device.process_index)(grid)
    assert (process_of == process_of[..., :1]).all()


def test_a_row_over_several_processes_is_an_error():
    """One GPU per process, as launch/gpu/train.sbatch starts them."""
    devices = [Chip(i, 0, (0, 0, 0), "gpu", "NVIDIA H200", process_index=i) for i in range(8)]
    assert sharding.make_mesh(2, 4, 1, devices=devices).shape["fsdp"] == 4
    with pytest.raises(ValueError, match=r"the 1 devices of a process; set --config\.mesh\.tensor"):
        sharding.make_mesh(1, -1, 2, devices=devices)


def test_nodes_of_gpus_are_no_slices():
    """XLA numbers nodes in `slice_index` too, but fsdp may use several nodes."""
    devices = fake_slices(2, platform="gpu")
    assert sharding.num_slices(devices) == 1 and sharding.num_slices(jax.devices()) == 1


def test_adam_moments_lie_as_their_parameter(tiny_config):
    mesh = sharding.make_mesh(1, -1, 1)
    optimizer = optim.make_optimizer(optim.OptimizerConfig(), 10)
    state = init_state(tiny_config, optimizer, mesh, seed=0)[1]
    placed = sharding.param_shardings(jax.eval_shape(lambda: state.params), mesh)
    moments = state.opt_state[1]
    for name, value in state.params.items():
        for leaf in (value, moments.mu[name], moments.nu[name]):
            assert leaf.sharding.is_equivalent_to(placed[name], leaf.ndim), name
    assert state.step.sharding.is_fully_replicated


def test_the_table_adds_up():
    mesh = AbstractMesh((1, 4, 1), sharding.AXES)
    shapes = {
        "language.head_kernel_dv": jax.ShapeDtypeStruct((64, 32), jnp.float32),
        "newline_d": jax.ShapeDtypeStruct((16,), jnp.float32),
    }
    placed = {
        "language.head_kernel_dv": NamedSharding(mesh, P("fsdp", "tensor")),
        "newline_d": NamedSharding(mesh, P()),
    }
    head, newline, total = sharding.table(shapes, placed).splitlines()
    assert "fsdp, tensor" in head
    assert head.endswith("2.0 KiB")
    assert "replicated" in newline
    assert newline.endswith("64 B")
    assert "8.1 KiB in all, 2.1 KiB per device" in total
