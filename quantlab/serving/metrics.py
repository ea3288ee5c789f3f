"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Callable

from quantlab.errors import missing_extra

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """One server's counters, in a registry of their own.

    Raises:
        InputError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Histogram
        except ImportError:
            raise missing_extra("prometheus-client", "serve") from None
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "quantlab_requests", "Requests that were answered.", ["path", "status"], registry=registry
        )
        tokens = {"prompt": "Tokens of prompts.", "cached": "Those that needed no computing.", "generated": "Drawn."}
        self._tokens = {
            name: Counter(f"quantlab_{name}_tokens", told, registry=registry) for name, told in tokens.items()
        }
        spans = {"queue": "Waiting for a turn.", "run": "Of a turn.", "first_piece": "From request to first text."}
        self._seconds = {
            name: Histogram(f"quantlab_{name}_seconds", told, buckets=SECONDS, registry=registry)
            for name, told in spans.items()
        }

    def watch(self, name: str, told: str, value: Callable[[], float]) -> None:
        """Tell a number that is looked up whenever somebody reads."""
        from prometheus_client import Gauge

        Gauge(f"quantlab_{name}", told, registry=self._registry).set_function(value)

    def count(self, path: str, status: int) -> None:
        """A request has been answered."""
        self._requests.labels(path, str(status)).inc()

    def add_tokens(self, name: str, count: int) -> None:
        """`prompt`, `cached` or `generated` ones."""
        self._tokens[name].inc(count)

    def observe(self, name: str, seconds: float) -> None:
        """A span: `queue`, `run` or `first_piece`."""
        self._seconds[name].observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """What is told, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
