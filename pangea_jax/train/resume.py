"""Orbax checkpoints of a run: model, optimiser, step, data iterator and progress together.

They are saved in the background. A checkpoint appears under its name only when it is complete. A kill during the save
leaves a temporary folder, which the next start removes. Reading a checkpoint detects later damage: metadata and arrays
must decode, the sums of the arrays' bits must equal those on the devices before the save, and the data's position and
the progress must have the checksums that were written with them.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from pangea_jax.checkpoints import CheckpointError
from pangea_jax.data.feed import check_saved
from pangea_jax.train.state import TrainState
from pangea_jax.work import paths
from pangea_jax.work.atomic import json_sum

SET_ASIDE = ".damaged"
# Errors from reading incomplete or overwritten files. Missing memory and missing permission raise others.
_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, FileNotFoundError)
_UNREADABLE += (IsADirectoryError, NotADirectoryError)


class _Damaged(Exception):
    """A checkpoint's files are not what was written."""


@dataclasses.dataclass
class _Chosen:
    """A policy of Orbax that preserves the checkpoint of one step."""

    step: int | None = None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one run, in `directory`/<step>/.

    Restoring continues the run exactly, on any mesh: with the same state, and with the batch after the last trained
    one.

    Args:
      keep: number of newest checkpoints to keep.
      keep_every: also keep, for good, every checkpoint whose step is a multiple of this.
      base: the model that the frozen parameters come from, if the checkpoints do not hold them; "": they do.
      before_save: called before each save, so that what it writes is there when the checkpoint is.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int,
        keep_every: int | None = None,
        base: str = "",
        before_save: Callable[[], None] = lambda: None,
    ):
        self._directory, self._before_save = paths.absolute(paths.path(directory)), before_save
        self._base = base
        policies = ocp.training.preservation_policies
        self._best = _Chosen()
        kept = [policies.LatestN(keep), self._best]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self._orbax = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, data: Iterator, progress: Mapping[str, Any]) -> None:
        """Copies the state to the host, then writes it in the background.

        Args:
          data: the Grain iterator; the batch of this step is the last that it gave.
          progress: everything else that the run needs to continue as if it had never stopped, as JSON values.
        """
        step = int(jax.device_get(state.step))
        if step == self.latest_step:
            return
        self._before_save()
        sums = [int(n) for n in jax.device_get(bit_sums(state))]
        written = {"progress": dict(progress), "bit_sums": sums}
        text = json.dumps(written | {"sha256": json_sum(written)})
        parts = {"state": self.saved(state), "data": data, "progress": {"json": text}}
        # Without force Orbax skips a save, even a run's last one, while it still writes another.
        self._orbax.save_checkpointables_async(step, parts, force=True)

    def saved(self, state: TrainState) -> TrainState:
        """What of a state its checkpoints hold."""
        return state.replace(frozen={}) if self._base else state

    def keep_best(self, step: int | None) -> None:
        """Keeps the checkpoint of this step, and no longer the one that was kept before it."""
        self._best.step = step

    def restore(
        self, abstract_state: TrainState, data: Iterator, frozen: Mapping[str, Array] | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """State and progress of the newest intact checkpoint; None in a new run.

        The state gets the shardings of `abstract_state`; `data` is set in place. If a checkpoint is damaged, this logs
        an error, renames it to <step>.damaged and takes the one before it. With several processes, perhaps only one saw
        the damage. The job then ends and must be started again.

        Args:
          frozen: the frozen parameters, if the checkpoints do not hold them.

        Raises:
          CheckpointError: every checkpoint is damaged, or the checkpoint belongs to another model or optimiser, or its
            base has changed.
          RestartError: the data differ from the data of the checkpoint.
        """
        while self.latest_step is not None:
            step = self.latest_step
            try:
                return self._load(step, abstract_state, data, frozen)
            except _Damaged as damage:
                self._set_aside(step, damage)
        aside = sorted(self._directory.glob(f"*{SET_ASIDE}*"))
        if aside:
            raise CheckpointError(
                f"every checkpoint in {self._directory} is damaged: {', '.join(p.name for p in aside)}; "
                "restore an intact one, or move these away to start again from step 0"
            )
        return None

    def close(self) -> None:
        """Waits until all saves are written."""
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        # After a second Ctrl-C, do not wait.
        if error_type is None or issubclass(error_type, Exception):
            self.close()

    def _load(self, step, abstract_state, data, frozen):
        folder = self._directory / str(step)
        self._check_model(step, self.saved(abstract_state))
        try:
            wanted = {"state": self.saved(abstract_state), "progress": {"json": ""}}
            found = self._orbax.load_checkpointables(step, wanted)
            progress = _checked(json.loads(found["progress"]["json"]))
            written, state = progress["bit_sums"], found["state"]
            check_saved(folder / "data")
        except _UNREADABLE as error:
            raise _Damaged(_first_line(error)) from error
        if self._base:
            state = state.replace(frozen=dict(frozen or {}))
        found = [int(n) for n in jax.device_get(bit_sums(state))]
        if self._base and _of_frozen(state, written) != _of_frozen(state, found):
            raise CheckpointError(
                f"{folder} was trained on {self._base}, whose weights are now others; bring back those of "
                "then, or give another --workdir"
            )
        if written != found:
            raise _Damaged("the sums of its arrays' bits differ from those at the time of the save")
        if int(jax.device_get(state.step)) != step:
            raise _Damaged(f"it holds step {int(jax.device_get(state.step))}")
        asyncio.run(_load_data(data, folder / "data"))
        return state, progress["progress"]

    def _check_model(self, step, abstract_state):
        """Raises CheckpointError for other shapes: this is the caller's mistake, not damage."""
        try:
            metadata = self._orbax.checkpointables_metadata(step).metadata["state"]
            there = sorted(_shapes(metadata))
        except _UNREADABLE as error:
            raise _Damaged(_first_line(error)) from error
        if not there:  # Orbax has logged the reason
            raise _Damaged("its metadata cannot be read")
        here = sorted(_shapes(abstract_state))
        if there != here:
            only = [f"{shape} of {dtype}" for shape, dtype in here if (shape, dtype) not in there]
            raise CheckpointError(
                f"{self._directory / str(step)} is a checkpoint of another model or optimiser: it has "
                f"{len(there)} arrays, and the run has {len(here)}"
                + (f", among them {', '.join(only[:3])}" if only else "")
                + "; give another --workdir"
            )

    def _set_aside(self, step, damage):
        folder = self._directory / str(step)
        suffixes = (SET_ASIDE, *(f"{SET_ASIDE}-{number}" for number in range(2, 1000)))
        targets = (folder.with_name(f"{step}{suffix}") for suffix in suffixes)
        target = next(target for target in targets if not target.exists())
        with contextlib.suppress(FileNotFoundError):  # another process saw it too
            folder.rename(target)
        said = f"checkpoint {folder} is damaged ({damage}); it is kept as {target.name}"
        if jax.process_count() > 1:
            raise CheckpointError(f"{said}; start the job again to continue from the one before")
        logging.error("%s; the run continues from the one before", said)
        self._orbax.reload()


def _checked(progress: Any) -> dict[str, Any]:
    """Raises ValueError if the progress is not what was written. Earlier versions wrote no checksum."""
    if progress.keys() != {"progress", "bit_sums"}:
        written = {name: value for name, value in progress.items() if name != "sha256"}
        if progress["sha256"] != json_sum(written):
            raise ValueError("its progress does not have its checksum")
    return progress


async def _load_data(data, folder):
    """Follows Orbax's protocol without Orbax, which would hide the error messages of the data."""
    await (await data.load(folder))


@jax.jit
def bit_sums(state: Any) -> list[UInt32[Array, ""]]:
    """For every array, the sum modulo 2^32 of its values' bits, read as integers.

    It is the same on every mesh, and it changes if one value changes. It reads the memory of the devices once.
    """

    def one(x):
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return [one(x) for x in jax.tree.leaves(state)]


def _of_frozen(state: TrainState, sums: list[int]) -> list[int]:
    """Those of `bit_sums` that belong to frozen parameters."""
    none = jax.tree.map(lambda _: False, state)
    marked = none.replace(frozen=jax.tree.map(lambda _: True, state.frozen))
    return [n for n, frozen in zip(sums, jax.tree.leaves(marked), strict=True) if frozen]


def _shapes(tree) -> Iterator[tuple[tuple[int, ...], str]]:
    for leaf in jax.tree.leaves(tree):
        if hasattr(leaf, "shape"):
            yield tuple(leaf.shape), str(jnp.dtype(leaf.dtype))


def _first_line(error: Exception) -> str:
    """The first part of a message; TensorStore's messages continue with a list of source lines."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].split(" [")[0]
    return text[:300]
