"""Reads the HLO text of compiled programs and counts the bytes that devices send to each other."""

import dataclasses
import functools
import math
import re
from collections import Counter
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+|f8\w*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLEE = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


class Array(NamedTuple):
    """An array of a program.

    Attributes:
      space: where a TPU keeps it: 0 main memory, 1 the fast memory of the core, 5 the host.
    """

    dims: tuple[int, ...]
    bytes: int
    space: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      arrays: of the result.
      operands: names of other instructions.
      number: of a parameter; -1 for others.
      rest: the line after the opcode.
    """

    name: str
    opcode: str
    arrays: list[Array]
    operands: list[str]
    number: int
    rest: str

    def callees(self) -> list[str]:
        """Computations that it calls."""
        groups = _CALLEE.findall(self.rest)
        return [name for group in groups for name in re.findall(r"%?([\w.\-]+)", group)]

    def callee(self, key: str) -> str:
        """The computation that it calls as `key`, such as "body"."""
        return re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)[1]


def parse(line: str) -> Instruction | None:
    """The instruction of a line; None for other lines."""
    parsed = _INSTRUCTION.match(line)
    if not parsed:
        return None
    name, shape, opcode, rest = parsed.groups()
    given = rest.split(")")[0]
    number = int(given) if opcode == "parameter" else -1
    return Instruction(
        name, opcode, _arrays(shape), re.findall(r"%([\w.\-]+)", given), number, rest
    )


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of each kind of collective that one device takes part in, in one run of the program.

    The output counts, such as the gathered array; for a reduce-scatter the input counts. The body of a loop counts once
    per iteration. If the compiler splits a collective into several instructions, they have one channel and count once.
    With several TPU slices these are the collectives within a slice.

    Raises:
      ValueError: the number of iterations of a loop with collectives is unknown.
    """
    return _sums(text, _collective)


def dcn_bytes(text: str) -> dict[str, int]:
    """Bytes that one device sends to other TPU slices over the data centre network, by kind of collective.

    The body of a loop counts once per iteration.

    Raises:
      ValueError: the number of iterations of a loop that sends is unknown.
    """
    return _sums(text, _dcn_send)


def _sums(text, read):
    """{kind: bytes} of what `read` finds in the program.

    Args:
      read: maps ((computation, name), opcode, rest of the line, sizes of the arrays defined so far) of an instruction
        to ((kind, identity), bytes), or to None.
    """
    bodies, entry = computations(text)

    @functools.cache
    def found(name):
        """{(kind, identity): bytes} of a computation and what it calls."""
        bytes_of, sizes = Counter(), {}
        for line in bodies.get(name, ()):
            parsed = _INSTRUCTION.match(line)
            if not parsed:
                continue
            result, shape, opcode, rest = parsed.groups()
            sizes[result] = _array_bytes(shape)
            own = read((name, result), opcode, rest, sizes)
            if own:
                bytes_of[own[0]] = own[1]
                continue
            called = Counter()
            for callees in _CALLEE.findall(rest):
                for callee in re.findall(r"%?([\w.\-]+)", callees):
                    called |= found(callee)
            if called and opcode == "while":
                iterations = turns(rest, bodies)
                if iterations is None:
                    raise ValueError(f"loop {result} communicates an unknown number of times")
                called = Counter({key: iterations * size for key, size in called.items()})
            bytes_of |= called
        return bytes_of

    total = Counter()
    for (kind, _), size in found(entry).items():
        total[kind] += size
    return dict(sorted(total.items()))


def _collective(name, opcode, rest, sizes):
    kind = opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # An asynchronous start returns its operands as well.
    size = (sum if opcode == kind else max)(sizes[name[1]])
    if kind == "reduce-scatter":
        operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
        size = sum(sum(sizes.get(operand, ())) for operand in operands)
    channel = re.search(r"channel_id=(\d+)", rest)
    return (kind, channel[1] if channel else name), size


def _dcn_send(name, opcode, rest, sizes):
    # libtpu's runtime for several slices ("megascale") writes transfers between slices as sends to the host.
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', rest)
    if opcode != "send" or not kind:
        return None
    return (kind[1].lower().replace("_", "-"), name), max(sizes[name[1]])


def computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Lines of each computation by name, and the name of the first to run."""
    found, lines, entry = {}, None, None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif lines is not None:
            lines.append(line)
    return found, entry


def turns(rest: str, computations) -> int | None:
    """How often a loop runs: the compiler's trip count, or else the bound of its counter divided by its step.

    The counters of `jax.lax.scan`, and of loops that XLA makes from a product, start from 0.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition, body = (
        computations[re.search(rf"{part}=%?([\w.\-]+)", rest)[1]] for part in ("condition", "body")
    )
    lines = _definitions(condition)
    compared = re.search(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", lines["ROOT"])
    bound = compared and re.search(r"constant\((\d+)\)", lines[compared[2]])
    index = compared and re.search(r"get-tuple-element\(.*index=(\d+)", lines[compared[1]])
    if not (bound and index):
        return None
    lines = _definitions(body)
    values = re.findall(r"%([\w.\-]+)", lines["ROOT"].split(" tuple(")[1].split(")")[0])
    raised = lines[values[int(index[1])]]
    while copied := re.search(r" copy\(%?([\w.\-]+)\)", raised):
        raised = lines[copied[1]]
    added = re.search(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)", raised)
    for name in added.groups() if added else ():
        if step := re.search(r" constant\((\d+)\)", lines[name]):
            return math.ceil(int(bound[1]) / int(step[1]))
    return None


def _definitions(lines) -> dict[str, str]:
    """Instructions by the name that they define; the root also as "ROOT"."""
    found = {}
    for line in lines:
        name = re.match(r"^\s+(ROOT )?%?([\w.\-]+) = ", line)
        if name:
            found[name[2]] = line
            if name[1]:
                found["ROOT"] = line
    return found


def _array_bytes(shape: str) -> list[int]:
    """Sizes of the arrays in the text of a (tuple) shape."""
    return [array.bytes for array in _arrays(shape)]


def _arrays(shape: str) -> list[Array]:
    found = []
    for kind, dims, layout in _ARRAY.findall(shape):
        bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
        space = re.search(r"S\((\d+)\)", layout)
        dims = tuple(int(d) for d in dims.split(",") if d)
        found.append(Array(dims, math.prod(dims) * bits // 8, int(space[1]) if space else 0))
    return found
