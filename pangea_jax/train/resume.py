"""Checkpoints with Orbax: model, optimiser, step, data iterator and progress in one; saved in the background.

A checkpoint appears under its name when it is whole: a kill meanwhile leaves a temporary folder, which the next
start removes. What a disk does to it afterwards is found out when it is read: metadata and arrays must decode,
and the sums of their bits must be those that the devices had before it was written.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from pangea_jax.checkpoints import CheckpointError
from pangea_jax.train.state import TrainState

SET_ASIDE = ".damaged"
# What reading torn or overwritten files raises; a device out of memory, or a file that may not be read, does not.
_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, FileNotFoundError)


class _Damaged(Exception):
    """A checkpoint's files are not what was written."""


class Checkpoints:
    """The checkpoints of one run, in `directory`/<step>/.

    Restoring continues the run exactly, on any mesh: the same state, and the batch after the last one
    trained on.

    Args:
      keep: so many of the newest stay.
      keep_every: those of steps that divide by it stay for good; None: no others.
    """

    def __init__(self, directory: str | Path, *, keep: int, keep_every: int | None = None):
        self._directory = Path(directory).absolute()
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self._orbax = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint, if any."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, data: Iterator, progress: Mapping[str, Any]) -> None:
        """Copies the state to the host, then writes in the background.

        Args:
          data: the Grain iterator, not yet advanced past the batch of this step.
          progress: what else the run needs to go on as if it had never stopped; JSON-able.
        """
        step = int(jax.device_get(state.step))
        if step == self.latest_step:
            return
        sums = [int(n) for n in jax.device_get(bit_sums(state))]
        text = json.dumps({"progress": dict(progress), "bit_sums": sums})
        parts = {"state": state, "data": data, "progress": {"json": text}}
        # Without force Orbax skips a save, the last of a run included, while another is being written.
        self._orbax.save_checkpointables_async(step, parts, force=True)

    def restore(
        self, abstract_state: TrainState, data: Iterator
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """State and progress of the newest sound checkpoint, None in a new run.

        The state goes onto the shardings of `abstract_state`; `data` is set in place. A damaged checkpoint
        is reported, renamed to <step>.damaged, and the one before it taken. A job of several
        processes, of which perhaps only one saw the damage, ends there and has to be started again.

        Raises:
          CheckpointError: every checkpoint is damaged, or it is one of another model or optimiser.
          RestartError: the data are not those of the checkpoint.
        """
        while self.latest_step is not None:
            step = self.latest_step
            try:
                return self._load(step, abstract_state, data)
            except _Damaged as damage:
                self._set_aside(step, damage)
        aside = sorted(self._directory.glob(f"*{SET_ASIDE}*"))
        if aside:
            raise CheckpointError(
                f"every checkpoint in {self._directory} is damaged: {', '.join(p.name for p in aside)}; "
                "bring back a sound one, or move these away to start again from step 0"
            )
        return None

    def close(self) -> None:
        """Waits for what is still being written."""
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        # Whoever presses Ctrl-C twice does not want to wait.
        if error_type is None or issubclass(error_type, Exception):
            self.close()

    def _load(self, step, abstract_state, data):
        folder = self._directory / str(step)
        self._check_model(step, abstract_state)
        try:
            wanted = {"state": abstract_state, "progress": {"json": ""}}
            found = self._orbax.load_checkpointables(step, wanted)
            progress = json.loads(found["progress"]["json"])
            written, state = progress["bit_sums"], found["state"]
            for file in (folder / "data").glob("process_*.json"):
                json.loads(file.read_text(encoding="utf-8"))
            next((folder / "data").glob("process_*.json"))
        except (*_UNREADABLE, StopIteration) as error:
            raise _Damaged(_first_line(error)) from error
        if written != [int(n) for n in jax.device_get(bit_sums(state))]:
            raise _Damaged(
                "the bits of its arrays do not sum up to what they did when it was saved"
            )
        if int(jax.device_get(state.step)) != step:
            raise _Damaged(f"it holds step {int(jax.device_get(state.step))}")
        asyncio.run(_load_data(data, folder / "data"))
        return state, progress["progress"]

    def _check_model(self, step, abstract_state):
        """A state of other shapes is a mistake of the caller, not of the disk."""
        try:
            metadata = self._orbax.checkpointables_metadata(step).metadata["state"]
            there = sorted(_shapes(metadata))
        except _UNREADABLE as error:
            raise _Damaged(_first_line(error)) from error
        if not there:  # Orbax has logged why
            raise _Damaged("its metadata cannot be read")
        here = sorted(_shapes(abstract_state))
        if there != here:
            only = [f"{shape} of {dtype}" for shape, dtype in here if (shape, dtype) not in there]
            raise CheckpointError(
                f"{self._directory / str(step)} is a checkpoint of another model or optimiser: it has "
                f"{len(there)} arrays and the run {len(here)}"
                + (f", among them {', '.join(only[:3])}" if only else "")
                + "; give another --workdir"
            )

    def _set_aside(self, step, damage):
        folder = self._directory / str(step)
        target = folder.with_name(f"{step}{SET_ASIDE}")
        for number in range(2, 1000):
            if not target.exists():
                break
            target = folder.with_name(f"{step}{SET_ASIDE}-{number}")
        with contextlib.suppress(FileNotFoundError):  # another process saw it too
            folder.rename(target)
        said = f"checkpoint {folder} is damaged ({damage}); it is kept as {target.name}"
        if jax.process_count() > 1:
            raise CheckpointError(f"{said}; start the job again to go on from the one before")
        logging.error("%s, and the one before it is taken", said)
        self._orbax.reload()


async def _load_data(data, folder):
    """By Orbax's protocol but not through Orbax, which would hide what the data have to say."""
    await (await data.load(epath.Path(folder)))


@jax.jit
def bit_sums(state: Any) -> list[UInt32[Array, ""]]:
    """For every array the sum of its bits read as integers, modulo 2^32: the same on every mesh, and
    another if one value changes. It costs one pass over the memory of the devices."""

    def one(x):
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return [one(x) for x in jax.tree.leaves(state)]


def _shapes(tree) -> Iterator[tuple[tuple[int, ...], str]]:
    for leaf in jax.tree.leaves(tree):
        if hasattr(leaf, "shape"):
            yield tuple(leaf.shape), str(jnp.dtype(leaf.dtype))


def _first_line(error: Exception) -> str:
    """The first clause of a message: TensorStore's go on with a list of source lines."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].split(" [")[0]
    return text[:300]
