"""Runs numbered pieces of work in processes of this machine or on Apache Beam."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from multiprocessing import get_context

from pangea_jax.work.restart import WorkError

Run = Callable[[Callable[[int], None], Iterable[int]], Iterator[int]]
"""Runs a function on every item; yields each item when it is done."""


class Local:
    """Runs on this machine in `workers` processes; with one worker, in the calling process."""

    def __init__(self, workers: int):
        self.workers = workers
        self._pool: futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Local":
        if self.workers > 1:
            # Arrow and the tokenizer have threads, which do not survive a fork.
            self._pool = futures.ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=_ignore_interrupts
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
            raise WorkError(
                "a worker was killed, perhaps because memory ran out; run the same command again to "
                "continue, with fewer --workers if memory is short"
            ) from None

    @staticmethod
    def _finished(pending: dict[futures.Future, int]) -> Iterator[int]:
        done, _ = futures.wait(pending, return_when=futures.FIRST_COMPLETED)
        for future in done:
            item = pending.pop(future)
            future.result()
            yield item


def _ignore_interrupts() -> None:
    # Ctrl-C reaches all processes, but only the main process must react: it ends the others.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Beam:
    """Runs every step as an Apache Beam pipeline: on one machine, Dataflow, Flink or Spark.

    All workers need pangea_jax, and the input and output as files (NFS, Filestore, a mounted bucket).

    Args:
      arguments: Beam's pipeline options, e.g. `["--runner=DirectRunner"]`.

    Raises:
      WorkError: Beam is not installed.
    """

    def __init__(self, arguments: Sequence[str]):
        try:
            import apache_beam
            from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
        except ImportError:
            raise WorkError(
                "Apache Beam is missing; run: pip install apache-beam, or pip install -r "
                "requirements-curation.txt for launch/curate.py"
            ) from None
        self._beam, self._options = apache_beam, PipelineOptions(list(arguments))
        standard = self._options.view_as(StandardOptions)
        if standard.runner in (None, "DirectRunner", "direct"):
            # At every start, DirectRunner tries to download another runner before it takes this one.
            standard.runner = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"

    def __call__(self, function: Callable[[int], None], items: Iterable[int]) -> Iterator[int]:
        items = list(items)
        if items:
            beam = self._beam
            with beam.Pipeline(options=self._options) as pipeline:
                numbers = pipeline | "items" >> beam.Create(items, reshuffle=True)
                _ = numbers | function.__name__ >> beam.Map(function)
        yield from items
