"""Where numbered pieces of work are done: processes of this machine, or Apache Beam."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from multiprocessing import get_context

Run = Callable[[Callable[[int], None], Iterable[int]], Iterator[int]]
"""Runs a function on every item, wherever; yields an item when it is done."""


class RunnerError(RuntimeError):
    """The work cannot be run; says what to do."""


class Local:
    """Runs on this machine, in `workers` processes; with one, in this very process."""

    def __init__(self, workers: int):
        self.workers = workers
        self._pool: futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Local":
        if self.workers > 1:
            # Not forked: Arrow and the tokenizer run threads, which do not survive a fork.
            self._pool = futures.ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=_leave_interrupts
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, function: Callable[[int], None], items: Iterable[int]) -> Iterator[int]:
        if self._pool is None:
            for item in items:
                function(item)
                yield item
            return
        pending: dict[futures.Future, int] = {}
        try:
            for item in items:
                pending[self._pool.submit(function, item)] = item
                if len(pending) >= 2 * self.workers:
                    yield from self._finished(pending)
            while pending:
                yield from self._finished(pending)
        except futures.process.BrokenProcessPool:
            problem = "a worker was killed, perhaps for want of memory; try fewer --workers"
            raise RunnerError(f"{problem}; the same command goes on") from None

    @staticmethod
    def _finished(pending: dict[futures.Future, int]) -> Iterator[int]:
        done, _ = futures.wait(pending, return_when=futures.FIRST_COMPLETED)
        for future in done:
            item = pending.pop(future)
            future.result()
            yield item


def _leave_interrupts() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Beam:
    """Runs every step as an Apache Beam pipeline: on one machine, Dataflow, Flink or Spark.

    What is read and written must lie where all of its workers can reach it as files (NFS,
    Filestore, a mounted bucket), and pangea_jax must be installed there.

    Args:
      arguments: Beam's pipeline options, e.g. `["--runner=DirectRunner"]`.

    Raises:
      RunnerError: Beam is not installed.
    """

    def __init__(self, arguments: Sequence[str]):
        try:
            import apache_beam
            from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
        except ImportError:
            problem = "Apache Beam is missing; run: pip install apache-beam"
            problem += ", or pip install -r requirements-curation.txt for launch/curate.py"
            raise RunnerError(problem) from None
        self._beam, self._options = apache_beam, PipelineOptions(list(arguments))
        standard = self._options.view_as(StandardOptions)
        if standard.runner in (None, "DirectRunner", "direct"):
            # DirectRunner downloads another runner at every start, and takes this one if that fails.
            standard.runner = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"

    def __call__(self, function: Callable[[int], None], items: Iterable[int]) -> Iterator[int]:
        items = list(items)
        if items:
            beam = self._beam
            with beam.Pipeline(options=self._options) as pipeline:
                numbers = pipeline | "items" >> beam.Create(items, reshuffle=True)
                _ = numbers | function.__name__ >> beam.Map(function)
        yield from items
