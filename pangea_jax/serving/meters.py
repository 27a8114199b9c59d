"""What Prometheus reads at `/metrics`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Meters:
    """The measures of one server. Tokens a second are the `rate` of a counter of tokens."""

    def __init__(self, rows: int):
        self._registry = CollectorRegistry()

        def make(kind, name, said, **more):
            return kind(f"pangea_{name}", said, registry=self._registry, **more)

        self.requests = make(
            Counter, "requests", "Requests by path and status.", labelnames=("path", "status")
        )
        self.waiting = make(Gauge, "waiting_requests", "Requests that have no row yet.")
        self._rows_in_use = make(Gauge, "rows_in_use", "Answers under way.")
        self.rows_now = 0
        make(Gauge, "rows", "Answers that can be under way.").set(rows)
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts, pictures included.")
        self.new_tokens = make(Counter, "generated_tokens", "Tokens of answers.")
        self.cancelled = make(Counter, "cancelled_requests", "Answers that nobody waited for.")
        self.first_token = make(
            Histogram,
            "time_to_first_token_seconds",
            "From a whole request to the first token.",
            buckets=_FIRST,
        )
        self.between_tokens = make(
            Histogram,
            "time_between_tokens_seconds",
            "Mean between the tokens that came together.",
            buckets=_BETWEEN,
        )
        self.whole = make(
            Histogram,
            "request_seconds",
            "From a whole request to the end of its answer.",
            buckets=_WHOLE,
        )

    def step(self, rows: int) -> None:
        """Notes how many rows are in use."""
        self.rows_now = rows
        self._rows_in_use.set(rows)

    def text(self) -> bytes:
        return generate_latest(self._registry)
