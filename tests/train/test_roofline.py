"""The estimate of a step's time, on programs whose cost is known by hand."""

import jax
import jax.numpy as jnp
import pytest

from pangea_jax.train import roofline

CHIP = roofline.Chip(flops=1e9, memory=1e6, links=1e3)
PROGRAM = """\
HloModule step

%body (carry: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %carry = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%carry), index=1
  %fast = f32[8,8]{1,0:T(8,128)S(1)} copy(%x)
  ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%i, %x)
}

%condition (carry.1: (s32[], f32[8,8])) -> pred[] {
  %carry.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (p: f32[8,8], q: f32[2,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = f32[2,8]{1,0} parameter(1)
  %all = f32[8,8]{1,0} all-gather(%q), replica_groups=[1,4]<=[4], dimensions={0}
  %loop = (s32[], f32[8,8]{1,0}) while(%all), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"10"}}
  ROOT %r = f32[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_of_copies_and_a_gather_by_hand():
    """Ten times 256 bytes are read into the fast memory; of 256 gathered bytes three quarters are received."""
    found = roofline.step_time(PROGRAM, CHIP, 4)
    assert found["memory_bytes"] == 10 * 256 and found["flops"] == 0
    assert found["work_s"] == pytest.approx(10 * 256 / 1e6)
    assert found["wait_s"] == pytest.approx(0.75 * 256 / 1e3)
    assert found["step_s"] == pytest.approx(found["work_s"] + found["wait_s"])


def test_an_asynchronous_gather_runs_beside_the_loop():
    gather = "%all = f32[8,8]{1,0} all-gather(%q), replica_groups=[1,4]<=[4], dimensions={0}"
    assert gather in PROGRAM
    start = gather.replace(
        "%all = f32[8,8]{1,0} all-gather(", "%all = (f32[2,8], f32[8,8]) all-gather-start("
    )
    found = roofline.step_time(PROGRAM.replace(gather, start), CHIP, 4)
    assert found["wait_s"] == 0 and found["step_s"] == pytest.approx(0.75 * 256 / 1e3)


@pytest.mark.parametrize("loop", [False, True])
def test_products_of_a_compiled_program_count_in_loops_too(loop):
    def step(x, kernels):
        if loop:
            return jax.lax.scan(lambda y, kernel: (y @ kernel, None), x, kernels)[0]
        return x @ kernels[0]

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 32), (5, 32, 32)))
    text = jax.jit(step).lower(*shapes).compile().as_text()
    found = roofline.step_time(text, CHIP, 1)
    assert found["flops"] == (5 if loop else 1) * 2 * 16 * 32 * 32


def test_a_padded_convolution_counts_real_entries_only():
    text = """\
ENTRY %main (a: f32[1,4,1], b: f32[3,1,1]) -> f32[1,4,1] {
  %a = f32[1,4,1]{2,1,0} parameter(0)
  %b = f32[3,1,1]{2,1,0} parameter(1)
  ROOT %c = f32[1,4,1]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
    assert roofline.step_time(text, CHIP, 1)["flops"] == 2 * (4 + 3 + 3)


def test_a_loop_of_unknown_length_is_an_error():
    text = PROGRAM.replace('backend_config={"known_trip_count":{"n":"10"}}', "x=1").replace(
        "  ROOT %less = pred[] constant(true)",
        "  %n = s32[] get-tuple-element(%carry.1), index=0\n"
        "  %m = s32[] get-tuple-element(%carry.1), index=0\n"
        "  ROOT %less = pred[] compare(%n, %m), direction=LT",
    )
    with pytest.raises(ValueError, match="loop loop runs an unknown number of times"):
        roofline.step_time(text, CHIP, 4)
