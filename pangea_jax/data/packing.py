"""Decides which conversations share a row.

Packing sees only the size of an example, (tokens, tiles, targets). A row has a capacity for each.
`pangea_jax.batch.Batch.fill` then writes the examples into their rows.
"""

import bisect
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

Size = tuple[int, int, int]


def balance(sizes: Sequence[Size], num_rows: int, capacity: Size) -> list[list[int]] | None:
    """Spreads examples over `num_rows` rows: the longest first, each to the row with the most room.

    Returns:
      The examples of each row, or None if they do not fit.
    """
    room = [list(capacity) for _ in range(num_rows)]
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        tokens, tiles, targets = sizes[i]
        fitting = [
            row
            for row, left in enumerate(room)
            if tokens <= left[0] and tiles <= left[1] and targets <= left[2]
        ]
        if not fitting:
            return None
        place = max(fitting, key=lambda row: room[row][0])
        room[place] = [left - n for left, n in zip(room[place], sizes[i], strict=True)]
        rows[place].append(i)
    return rows


class Plan:
    """Which examples share a row, decided before any example is read.

    Attributes:
      members: positions of the examples, row after row.
      starts: row r holds `members[starts[r] : starts[r + 1]]`.
    """

    def __init__(self, rows: Sequence[Sequence[int]]):
        self.members = np.array([i for row in rows for i in row], np.int64)
        self.starts = np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Int[np.ndarray, " k"]:
        return self.members[self.starts[row] : self.starts[row + 1]]


def plan_rows(sizes: Int[np.ndarray, "n 3"], capacity: Size, *, seed: int, window: int) -> Plan:
    """Best-fit decreasing within windows of shuffled examples; each window's rows are shuffled.

    After sorting by length, short examples fill the gaps that long ones leave. A packer that takes
    examples in their order cannot do this. Sorting moves an example at most `window` places from
    its shuffled position. It takes about 2 us per example.

    Args:
      sizes: (tokens, tiles, targets) of every example; examples with 0 tokens are left out.
      capacity: the largest (tokens, tiles, targets) of a row.
      seed: decides both shuffles.
      window: number of examples that are sorted together.

    Raises:
      ValueError: an example is larger than a row.
    """
    too_large = np.flatnonzero((sizes > np.asarray(capacity)).any(axis=1))
    if len(too_large):
        raise ValueError(
            f"{len(too_large)} examples are larger than a row of {list(capacity)} (tokens, tiles, "
            f"targets); the first is number {too_large[0]} with {sizes[too_large[0]].tolist()}"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(sizes[:, 0] > 0))
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        chosen = order[start : start + window]
        chosen = chosen[np.argsort(-sizes[chosen, 0], kind="stable")]
        packed = _best_fit(chosen.tolist(), sizes[chosen].tolist(), capacity)
        rows += [packed[i] for i in rng.permutation(len(packed))]
    return Plan(rows)


def plan_batches(
    sizes: Int[np.ndarray, "n 3"], capacity: Size, *, rows: int, examples: int, seed: int
) -> Plan:
    """Batches of `examples` shuffled examples each, spread evenly over their `rows` rows.

    A batch has one example of each of `examples` classes of length, so that all batches are about
    equally long and little room is wasted.
    If a batch has too many long examples by chance, it exchanges its largest example for the
    smallest one of the next batches, until it fits.

    Args:
      sizes, capacity: see `plan_rows`.

    Raises:
      ValueError: the examples do not fit the rows, even after all exchanges.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(sizes[:, 0] > 0))
    order = order[: len(order) // examples * examples]
    classes = order[np.argsort(sizes[order, 0], kind="stable")].reshape(examples, -1)
    batches = rng.permuted(classes, axis=1).T.tolist()
    of = sizes.tolist()
    packed = [balance([of[i] for i in batch], rows, capacity) for batch in batches]

    def fill(number: int) -> float:
        return max(n / room for n, room in zip(of[number], capacity, strict=True))

    def exchange(here: int) -> None:
        for step in range(1, len(batches)):
            there = (here + step) % len(batches)
            mine, theirs = batches[here], batches[there]
            large = max(range(examples), key=lambda i: fill(mine[i]))
            small = min(range(examples), key=lambda i: fill(theirs[i]))
            mine[large], theirs[small] = theirs[small], mine[large]
            changed = [balance([of[i] for i in batch], rows, capacity) for batch in (mine, theirs)]
            if changed[1] is None and packed[there] is not None:
                mine[large], theirs[small] = theirs[small], mine[large]
                continue
            packed[here], packed[there] = changed
            if packed[here] is not None:
                return
        raise ValueError(
            f"{examples} conversations do not fit {rows} rows of {list(capacity)} (tokens, tiles, "
            "targets); raise pipeline.row_tokens, row_tiles or max_targets, or lower examples_per_row"
        )

    for number in range(len(batches)):
        if packed[number] is None:
            exchange(number)
    pairs = zip(batches, packed, strict=True)
    return Plan([[batch[i] for i in row] for batch, found in pairs for row in found])


def _best_fit(numbers, sizes, capacity) -> list[list[int]]:
    """Puts each example, in order, into the open row in which it leaves the fewest free tokens."""
    rows: list[list[int]] = []
    room: list[tuple[int, int, int, int]] = []  # sorted (tokens, tiles, targets, row)
    for number, (tokens, tiles, targets) in zip(numbers, sizes, strict=True):
        place = bisect.bisect_left(room, (tokens,))
        while place < len(room) and (room[place][1] < tiles or room[place][2] < targets):
            place += 1
        if place < len(room):
            free = room.pop(place)
        else:
            free = (*capacity, len(rows))
            rows.append([])
        rows[free[3]].append(number)
        bisect.insort(room, (free[0] - tokens, free[1] - tiles, free[2] - targets, free[3]))
    return rows
