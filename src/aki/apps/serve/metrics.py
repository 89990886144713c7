"""What the server says of itself to Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/metrics")


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._requests = Counter("aki_requests", "Requests answered", ["path", "status"], registry=own)
        self.tokens = Counter("aki_generated_tokens", "Tokens generated for clients", registry=own)
        self.first_token = Histogram(
            "aki_first_token_seconds", "From the prompt's arrival to the first text", registry=own
        )
        self.batch = Histogram(
            "aki_batch_requests", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=own
        )
        self._waiting = Gauge("aki_waiting_requests", "Requests that wait for the model", registry=own)

    def watch(self, waiting: Callable[[], float]) -> None:
        self._waiting.set_function(waiting)

    def count(self, path: str, status: int) -> None:
        self._requests.labels(path if path in PATHS else "other", status).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
