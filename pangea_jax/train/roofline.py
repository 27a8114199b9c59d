"""An estimate of the time of a step from the text of its compiled program and the rates of the chip.

The model, for each computation of the program:

- An instruction takes the longer of its FLOPs (matrix products and convolutions) at the peak rate, and the bytes of its
  operands and results at the rate of the memory. Arrays in the chip's fast memory cost nothing.
- A synchronous collective takes the bytes that a device must receive at the rate of the links, and its latency.
- Asynchronous collectives and copies run beside the instructions of the same computation, the body of a loop for
  example: the computation takes the longest of the three, and its synchronous collectives are added.
- The body of a loop counts once per iteration. Of the branches of a condition the longest counts.

No instruction reaches these rates, so it is a lower bound for a TPU. It is meant to compare programs. Pallas kernels
are black boxes: their bytes count, and their FLOPs must be added (`kernel_flops`).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from pangea_jax.train import hlo


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one device.

    Attributes:
      flops: of matrix products, a second.
      memory: bytes a second of its main memory, read or written.
      links: bytes a second that it can receive from the chips of its slice, over all links.
      axes: dimensions of the network of a slice. A collective among all chips uses all links, another
        one those of one dimension.
      network: bytes a second over the data centre network.
      host: bytes a second to or from the host's memory.
      overhead_s: of each instruction. latency_s: of each collective.
    """

    flops: float
    memory: float
    links: float
    axes: int = 1
    network: float = math.inf
    host: float = math.inf
    overhead_s: float = 0.0
    latency_s: float = 0.0


# https://docs.cloud.google.com/tpu/docs/v5e, v5p and v6e: peak compute (bf16), HBM bandwidth, and half of the
# "bidirectional" ICI bandwidth per chip. Network: of a v5e or v6e host's cards, shared by its 8 chips; of a v5p chip.
# Host: https://jax-ml.github.io/scaling-book/tpus, "PCIe".
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(197e12, 819e9, 200e9, 2, 25e9 / 8, 16e9),
    "v5p": Chip(459e12, 2765e9, 600e9, 3, 6.25e9, 16e9),
    "v6e": Chip(918e12, 1638e9, 400e9, 2, 100e9 / 8, 32e9),
}


@dataclasses.dataclass
class Cost:
    """Seconds of a program on one device; `flops` and `bytes` are counts.

    Attributes:
      work: instructions, one after the other.
      waits: synchronous collectives.
      beside: asynchronous transfers, by what they use: "links", "memory", "host", "network".
      hidden: seconds of transfers that ran beside instructions in computations already summed up.
    """

    work: float = 0.0
    waits: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    hidden: float = 0.0
    beside: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds a computation that ends before the next begins."""
        exposed = other.exposed
        self.work += times * (other.work + exposed)
        self.waits += times * other.waits
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.hidden += times * (other.hidden + sum(other.beside.values()) - exposed)

    @property
    def exposed(self) -> float:
        """Seconds of asynchronous transfers that no instruction hides."""
        return max(0.0, max(self.beside.values(), default=0.0) - self.work)

    @property
    def seconds(self) -> float:
        return self.work + self.exposed + self.waits


def step_time(text: str, chip: Chip, devices: int, kernel_flops: float = 0.0) -> dict[str, float]:
    """Estimates the time of one run of a compiled program.

    Args:
      text: the HLO of the compiled program of one device.
      devices: of one slice.
      kernel_flops: of one device's Pallas kernels.

    Returns:
      `step_s`, and of it `work_s` (instructions, and transfers that they do not hide) and `wait_s` (synchronous
      collectives); `hidden_s` of transfers beside them; `flops` and `memory_bytes` of one device.

    Raises:
      ValueError: the number of iterations of a loop is unknown.
    """
    cost = Cost()
    cost.add(_Program(text, chip, devices).cost())
    cost.work += kernel_flops / chip.flops
    return {
        "step_s": cost.seconds,
        "work_s": cost.work,
        "wait_s": cost.waits,
        "hidden_s": cost.hidden,
        "flops": cost.flops + kernel_flops,
        "memory_bytes": cost.bytes,
    }


_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "copy-done", "async-done", "async-update"),
    *("recv", "recv-done", "send-done", "slice-done", "optimization-barrier", "domain"),
    *(f"{kind}-done" for kind in hlo.COLLECTIVES),
}
_PART_READ = ("dynamic-slice", "slice", "gather")
_FAST, _HOST = 1, 5  # memory spaces of a TPU


class _Program:
    def __init__(self, text: str, chip: Chip, devices: int):
        self._lines, self._entry = hlo.computations(text)
        self._chip, self._devices = chip, devices
        self.cost = functools.partial(self._cost, self._entry)
        self._cost = functools.cache(self._cost)

    @functools.cached_property
    def _parsed(self):
        return functools.cache(
            lambda name: {i.name: i for i in map(hlo.parse, self._lines.get(name, ())) if i}
        )

    def _cost(self, name: str) -> Cost:
        found, defined = Cost(), self._parsed(name)
        for i in defined.values():
            if i.opcode in _FREE:
                continue
            if i.opcode == "while":
                turns = hlo.turns(i.rest, self._lines)
                if turns is None:
                    raise ValueError(f"loop {i.name} runs an unknown number of times")
                found.add(self._cost(i.callee("body")), turns)
            elif i.opcode == "conditional":
                found.add(max(map(self._cost, i.callees()), key=lambda cost: cost.seconds))
            elif i.opcode == "call":
                found.add(self._cost(i.callee("to_apply")))
            else:
                self._instruction(i, defined, found)
        return found

    def _instruction(self, i: hlo.Instruction, defined, found: Cost) -> None:
        chip = self._chip
        kind = i.opcode.removesuffix("-start")
        if kind in hlo.COLLECTIVES:
            seconds = self._collective(kind, i, defined)
            if i.opcode == kind:
                found.waits += seconds
            else:
                _beside(found, "links", seconds)
            return
        if i.opcode == "send":
            _beside(found, "network", max(map(_size, i.arrays)) / chip.network)
            return
        flops, inside = self._flops(i, defined), self._inside(i)
        for seconds in inside:  # a collective within a fusion runs beside it
            _beside(found, "links", seconds)
        moved = self._moved(i, defined)
        memory, host = (
            sum(n for n, where in moved if (where == _HOST) is is_host) for is_host in (False, True)
        )
        found.flops, found.bytes = found.flops + flops, found.bytes + memory
        if host:
            _beside(found, "host", host / chip.host)
        if i.opcode in ("copy-start", "slice-start", "async-start"):
            _beside(found, "memory", memory / chip.memory)
        else:
            found.work += max(flops / chip.flops, memory / chip.memory) + chip.overhead_s

    def _collective(self, kind: str, i: hlo.Instruction, defined) -> float:
        """Seconds of a collective: what a device receives, at the rate of the links that its group uses."""
        group = _group(i.rest, self._devices)
        arrays = [_size(a) for a in i.arrays]
        size = sum(arrays) if i.opcode == kind else max(arrays)
        if kind == "reduce-scatter":
            size = sum(_size(a) for o in i.operands if o in defined for a in defined[o].arrays)
        share = (group - 1) / group if group > 1 else 0.0
        received = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * size
        axes = 1 if group == self._devices and kind != "collective-permute" else self._chip.axes
        return received * axes / self._chip.links + self._chip.latency_s

    def _flops(self, i: hlo.Instruction, defined) -> float:
        if i.opcode == "dot":
            return _dot_flops(i, defined)
        if i.opcode == "convolution":
            return _convolution_flops(i, defined)
        return sum(
            self._flops(j, self._parsed(name))
            for name in (i.callees() if i.opcode in ("fusion", "async-start", "map") else ())
            for j in self._parsed(name).values()
        )

    def _inside(self, i: hlo.Instruction) -> list[float]:
        if i.opcode != "fusion":
            return []
        found = []
        for name in i.callees():
            own = self._parsed(name)
            for j in own.values():
                if j.opcode in hlo.COLLECTIVES and "AsyncCollectiveStart" in " ".join(
                    self._lines[name]
                ):
                    found.append(self._collective(j.opcode, j, own))
                found += self._inside(j)
        return found

    def _moved(self, i: hlo.Instruction, defined) -> list[tuple[int, int]]:
        """(bytes, memory space) of what an instruction reads and writes; nothing for the fast memory."""
        moved = [(_size(a), a.space) for a in i.arrays]
        inner = self._parsed(i.callees()[0]) if i.opcode == "fusion" and i.callees() else {}
        places = {j.number: j for j in inner.values() if j.opcode == "parameter"}
        for number, name in enumerate(i.operands):
            if name not in defined:
                continue
            arrays = defined[name].arrays
            part = _part_read(places[number], inner) if number in places else None
            if i.opcode in _PART_READ and number == 0:
                part = sum(map(_size, i.arrays))
            if i.opcode == "dynamic-update-slice" and number == 0:
                part = 0
            moved += [(_size(a) if part is None else min(part, _size(a)), a.space) for a in arrays]
        update = _updated(i, inner, defined)
        if update is not None:  # in place
            moved[0] = update, moved[0][1]
        return [(size, space) for size, space in moved if space != _FAST]


def _beside(found: Cost, what: str, seconds: float) -> None:
    found.beside[what] = found.beside.get(what, 0.0) + seconds


def _size(array: hlo.Array) -> int:
    return array.bytes


def _part_read(parameter: hlo.Instruction, inner) -> int | None:
    """Bytes that a fusion reads of a parameter of which it only takes slices; None: all of it."""
    users = [j for j in inner.values() if parameter.name in j.operands]
    total = 0
    for j in users:
        if j.opcode == "bitcast":
            part = _part_read(j, inner)
            if part is None:
                return None
            total += part
        elif j.opcode in _PART_READ and j.operands[0] == parameter.name:
            total += sum(map(_size, j.arrays))
        elif not (j.opcode == "dynamic-update-slice" and j.operands[0] == parameter.name):
            return None
    return total if users else None


def _updated(i: hlo.Instruction, inner, defined) -> int | None:
    """Bytes that an update in place writes; None for other instructions."""
    own, update = defined, i
    if inner:
        own, update = inner, list(inner.values())[-1]
        while update.opcode == "bitcast" and update.operands[0] in own:
            update = own[update.operands[0]]
    if update.opcode != "dynamic-update-slice" or update.operands[1] not in own:
        return None
    return sum(map(_size, own[update.operands[1]].arrays))


def _group(rest: str, devices: int) -> int:
    """Devices that take part in a collective together."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(
            int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]) if axis in sizes
        )
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    return devices


def _dot_flops(i: hlo.Instruction, defined) -> float:
    left = defined[i.operands[0]].arrays[0].dims
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
    width = math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2.0 * width * math.prod(i.arrays[0].dims)


def _convolution_flops(i: hlo.Instruction, defined) -> float:
    """Counts the products of real entries: TPUs write batched products as dilated convolutions."""
    left, kernel = (defined[o].arrays[0].dims for o in i.operands[:2])
    inputs, weights, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    count = 2.0 * left[inputs.index("b")] * kernel[weights.index("i")] * kernel[weights.index("o")]
    count /= int(groups[1]) if groups else 1
    for axis in range(len(inputs) - 2):
        get = lambda key, default: settings[key].split("x")[axis] if key in settings else default  # noqa: B023, E731
        pad = int(get("pad", "0_0").split("_")[0])
        stride, dilate, spread = (
            int(get(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        size, out = left[inputs.index(str(axis))], i.arrays[0].dims[outputs.index(str(axis))]
        last = (size - 1) * dilate
        count *= sum(
            0 <= at <= last and at % dilate == 0
            for w in range(kernel[weights.index(str(axis))])
            for at in range(w * spread - pad, w * spread - pad + out * stride, stride)
        )
    return count
