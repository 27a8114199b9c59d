"""Parameters in 8 or 4 bits, made from a model in another form as they are read, see `pangea_jax.model.quantized`."""

import dataclasses
import math
import threading

import jax
import numpy as np

from pangea_jax.checkpoints.adapted import Weights
from pangea_jax.checkpoints.files import CheckpointError
from pangea_jax.model import PangeaConfig, quantized
from pangea_jax.sharding import quantized_part

_BLOCK_BYTES = 1 << 27  # of a kernel, read at once


def in_form(config: PangeaConfig, weights: str) -> PangeaConfig:
    """The config of the same model with its language model's weights in a form, "" for the dtype of the parameters."""
    language = dataclasses.replace(config.language, weights=weights)
    return dataclasses.replace(config, language=language)


def choose_form(config: PangeaConfig, weights: str | None, path) -> PangeaConfig:
    """The config of a model at `path` whose weights are wanted in a form; None for the form in which they are.

    Raises:
      CheckpointError: they are in 8 or 4 bits already.
      ValueError: there is no such form, or its groups divide no input.
    """
    quantized.check_form(weights)
    if not weights:
        return config
    if config.language.weights:
        raise CheckpointError(
            f"{path} has its weights in {config.language.weights} already; leave out weights={weights!r}, or give "
            "the model from which it was made"
        )
    return in_form(config, weights)


def input_axes(kernel: str) -> tuple[int, ...]:
    """The axes of a kernel, stacked if it is a block's, that a product contracts."""
    if kernel.endswith(".embedding_vd"):
        return (1,)
    stacked = ".blocks." in kernel
    return tuple(stacked + axis for axis in range(2 if "_kernel_hcd" in kernel else 1))


class QuantizedWeights:
    """The parameters of `config.language.weights`, rounded from the weights below. See `adapted.Weights`.

    A kernel is read and rounded in blocks of whole outputs, so neither it nor the model is ever in memory at once.

    Raises:
      ValueError: no size of a group divides the inputs of a kernel; the message names it.
    """

    threads = 1  # codes and scale of a kernel are made together

    def __init__(self, below: Weights, shapes: dict[str, tuple[int, ...]], config: PangeaConfig):
        self._below, self.shapes, self._form = below, dict(shapes), config.language.weights
        self._last: tuple = (None, None)
        self._scales: dict[tuple, np.ndarray] = {}
        self._lock = threading.Lock()

    def dtype(self, name: str) -> np.dtype:
        kernel, part = quantized_part(name)
        if not part:
            return self._below.dtype(name)
        return quantized.dtypes(self._form_of(kernel))[part == "scale"]

    def _form_of(self, kernel: str) -> str:
        return self._form if ".blocks." in kernel else "int8"

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """`array[index]` of one parameter. Codes and scales have their own dtype."""
        kernel, part = quantized_part(name)
        if not part:
            return self._below.read(name, index, dtype)
        inputs = input_axes(kernel)
        bounds = [slice(*s.indices(size)[:2]) for s, size in zip(index, self.shapes[name])]
        outputs = tuple(slice(None) if i in inputs else s for i, s in enumerate(bounds))
        mine = tuple(s if i in inputs else slice(None) for i, s in enumerate(bounds))
        with self._lock:
            found = self._codes(kernel, outputs) if part == "codes" else None
            if part == "scale":
                key = _key(kernel, outputs)
                if key not in self._scales:
                    self._codes(kernel, outputs)
                found = self._scales[key]
        return found[mine]

    def _codes(self, kernel: str, outputs: tuple[slice, ...]) -> np.ndarray:
        """The codes of some outputs of a kernel. They are kept until others are asked for."""
        key = _key(kernel, outputs)
        if self._last[0] != key:
            self._last = (None, None)
            codes, self._scales[key] = self._rounded(kernel, outputs)
            self._last = key, codes
        return self._last[1]

    def _rounded(self, kernel, outputs):
        """Codes and scale of some outputs of a kernel."""
        whole, form, inputs = self._below.shapes[kernel], self._form_of(kernel), input_axes(kernel)
        bounds = [slice(*s.indices(size)[:2]) for s, size in zip(outputs, whole)]
        sizes = tuple(s.stop - s.start for s in bounds)
        shapes = quantized.shapes(sizes, inputs, form, kernel)
        codes, scale = (_aligned(*each) for each in zip(shapes, quantized.dtypes(form)))
        axis = 0 if 0 not in inputs else max(inputs) + 1
        each = self._below.dtype(kernel).itemsize * math.prod(sizes) // sizes[axis]
        step = 1 if axis == 0 and ".blocks." in kernel else max(1, _BLOCK_BYTES // each)
        for start in range(0, sizes[axis], step):
            here = [slice(None)] * len(sizes)
            here[axis] = slice(start, min(start + step, sizes[axis]))
            read = list(bounds)
            read[axis] = slice(bounds[axis].start + start, bounds[axis].start + here[axis].stop)
            part = self._below.read(kernel, tuple(read), self._below.dtype(kernel))
            codes[tuple(here)], scale[tuple(here)] = _rounded_part(part, inputs, form)
        return codes, scale


def _rounded_part(part: np.ndarray, inputs: tuple[int, ...], form: str):
    """Codes and scale of a part of a kernel, whose axes before the inputs are one or none."""
    shapes = quantized.shapes(part.shape, inputs, form)
    if 0 not in inputs:
        if inputs == (1,) and part.ndim == 2:  # an embedding: its rows are the outputs
            codes, scale = quantized.quantize(part.T, form, part.shape[1])
            return codes.T, scale.T
        part = part[0]
        inputs = tuple(axis - 1 for axis in inputs)
    width = math.prod(part.shape[axis] for axis in inputs)
    last = part.shape[inputs[-1]]
    group = width if form == "int8" else quantized.group_size(last)
    codes, scale = quantized.quantize(part.reshape(width, -1), form, group)
    return codes.reshape(shapes[0]), scale.reshape(shapes[1])


def _key(kernel, outputs):
    return kernel, tuple((s.start, s.stop) for s in outputs)


def _aligned(shape, dtype) -> np.ndarray:
    """An array that JAX on a CPU uses without a copy."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + memory.size - 64].view(dtype).reshape(shape)


def plain(config: PangeaConfig) -> PangeaConfig:
    """The config of the weights that `QuantizedWeights` rounds."""
    return in_form(config, "")


def whole(params: dict[str, jax.Array], config: PangeaConfig) -> dict[str, jax.Array]:
    """Parameters with every kernel in float32 again, as the codes and scales say."""
    out = {}
    for name, value in params.items():
        kernel, part = quantized_part(name)
        if not part:
            out[name] = value
        elif part == "codes":
            form = config.language.weights if ".blocks." in kernel else "int8"
            out[kernel] = _dequantized(value, params[f"{kernel}.scale"], input_axes(kernel), form)
    return out


def _dequantized(codes, scale, inputs, form):
    if form == "int8":
        return codes * scale
    if 0 not in inputs:
        layers = [
            _dequantized(c, s, tuple(a - 1 for a in inputs), form) for c, s in zip(codes, scale)
        ]
        return jax.numpy.stack(layers)
    shape = list(codes.shape)
    shape[inputs[-1]] *= 2
    flat = (x.reshape(math.prod(x.shape[: len(inputs)]), -1) for x in (codes, scale))
    return quantized.dequantize(*flat, form).reshape(shape)
