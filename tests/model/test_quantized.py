"""Kernels in 8 and 4 bits: the product is that of the rounded values, and no wide copy of them is made."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pangea_jax.model import quantized

INPUTS, OUTPUTS = 256, 96  # inputs and outputs
SPREAD = {"int8": 127, "int4": 7}


def rounded(form, seed=0):
    """A random kernel, its codes and scale, and the values that these stand for."""
    kernel = np.random.default_rng(seed).standard_normal((INPUTS, OUTPUTS), np.float32)
    codes, scale = quantized.quantize(kernel, form, INPUTS if form == "int8" else 128)
    found = tuple(map(jnp.asarray, (codes, scale)))
    return kernel, *found, np.asarray(quantized.dequantize(*found, form))


@pytest.mark.parametrize("form", quantized.FORMS)
@pytest.mark.parametrize("rows", [3, 40])
def test_a_product_and_its_gradient_are_those_of_the_values(form, rows):
    """Few rows take the loop over pieces, many the whole kernel."""
    _, codes, scale, values = rounded(form)
    x = np.random.default_rng(1).standard_normal((rows, INPUTS), np.float32)
    found = quantized.product(x, codes, scale, form, jnp.float32)
    np.testing.assert_allclose(found, x @ values, atol=2e-4)

    def loss(product):
        return lambda x: jnp.sum(jnp.sin(product(x)))

    slope = jax.grad(loss(lambda x: quantized.product(x, codes, scale, form, jnp.float32)))(x)
    np.testing.assert_allclose(slope, jax.grad(loss(lambda x: x @ values))(x), atol=1e-3)
    narrow = quantized.product(x.astype(jnp.bfloat16), codes, scale, form, jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(np.float32), x @ values, atol=0.6)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_error_is_that_of_rounding_to_steps(form):
    """Every value is at most half a step off, and evenly so: a root mean square of step / sqrt(12)."""
    kernel, _, scale, values = rounded(form)
    groups = kernel.reshape(len(scale), -1, OUTPUTS)
    step = np.asarray(scale, np.float32)[:, None]
    np.testing.assert_allclose(step[:, 0], np.abs(groups).max(1) / SPREAD[form], rtol=4e-3)
    error = (groups - values.reshape(groups.shape)) / step
    assert np.abs(error).max() < 0.53  # half, and the rounding of the scale
    assert np.sqrt(np.mean(error**2)) == pytest.approx(12**-0.5, rel=0.03)


def test_nf4_takes_the_nearest_of_its_numbers():
    kernel, _, scale, values = rounded("nf4")
    groups = kernel.reshape(len(scale), -1, OUTPUTS) / np.asarray(scale, np.float32)[:, None]
    numbers = np.array(quantized._NF4, np.float32)
    assert len(numbers) == 16 and numbers[7] == 0
    nearest = numbers[np.abs(groups[..., None] - numbers).argmin(-1)]
    found = values.reshape(groups.shape) / np.asarray(scale, np.float32)[:, None]
    np.testing.assert_allclose(found, nearest, atol=1e-6)


def test_rounding_twice_changes_nothing():
    for form in quantized.FORMS:
        _, codes, _, values = rounded(form)
        again = quantized.quantize(values, form, INPUTS if form == "int8" else 128)[0]
        np.testing.assert_array_equal(again, codes)


def test_a_kernel_of_zeros_stays_zero():
    for form in quantized.FORMS:
        codes, scale = quantized.quantize(np.zeros((16, 4), np.float32), form, 16)
        assert not np.any(quantized.dequantize(jnp.asarray(codes), jnp.asarray(scale), form))


@pytest.mark.parametrize("form", quantized.FORMS)
def test_no_wide_copy_of_a_kernel_is_made_for_few_rows(form):
    """Pieces of a kernel are widened, never the whole; many rows widen one kernel at a time."""
    width, outputs, layers = 1024, 2048, 4
    group = width if form == "int8" else 128
    codes = jax.ShapeDtypeStruct(
        (layers, width // (1 + (form != "int8")), outputs), quantized.dtypes(form)[0]
    )
    scale = jax.ShapeDtypeStruct((layers, width // group, outputs), quantized.dtypes(form)[1])

    @functools.partial(jax.jit, static_argnames="form")
    def run(x, codes, scale, form):
        def body(x, kernel):
            return quantized.product(x, *kernel, form, x.dtype)[:, :width], None

        return jax.lax.scan(body, x, (codes, scale))[0]

    wide = 4 * width * outputs
    for rows, most in ((1, 0.6 * wide), (64, 2.7 * wide)):
        x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
        program = run.lower(x, codes, scale, form=form).compile()
        assert program.memory_analysis().temp_size_in_bytes < most + codes.size / layers
        stacks = rf"(?:f32|bf16)\[{layers},(?:{width}|{width // 2}),{outputs}\]"
        assert not re.search(stacks, program.as_text())


def test_groups_are_128_or_finer_and_refused_by_name():
    assert [quantized.group_size(n) for n in (3584, 64, 24)] == [128, 64, 8]
    with pytest.raises(ValueError, match="up_kernel_df has 20 inputs, which no group of 128, 64"):
        quantized.shapes((20, 32), (0,), "int4", "up_kernel_df")
    with pytest.raises(ValueError, match="'int3' is not one of int8, int4, nf4"):
        quantized.check_form("int3")
