"""What the server counts, in Prometheus' format."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3_jax.inference.requests import Statistics

PREFIX = "dsv3_jax"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
DISCONNECTED = 499


class Metrics:
    """Counters of one server, and of its engine as they stand when they are asked for."""

    def __init__(self, statistics: Callable[[], Statistics]):
        self._registry = CollectorRegistry()
        self.requests = Counter(f"{PREFIX}_requests", "Requests answered", ("route", "status"), registry=self._registry)
        self.seconds = Histogram(
            f"{PREFIX}_request_seconds",
            "From a request's arrival to the end of its answer",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            f"{PREFIX}_first_token_seconds",
            "From a completion's arrival to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(statistics))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class CountingRequests:
    """ASGI middleware around the whole app: a streamed answer has ended when its last byte is out."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]):
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Any other path is somebody's guess: as labels they would grow without end.
        route = scope["path"] if scope["path"] in self._routes else "other"
        start, status = time.perf_counter(), DISCONNECTED

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted_send)
        finally:
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - start)


class _EngineCollector(Collector):
    def __init__(self, statistics: Callable[[], Statistics]):
        self._statistics = statistics

    def collect(self) -> Iterator[Any]:
        now = self._statistics()
        for name, value, meaning in (
            ("requests_running", now.running, "Requests that have a slot"),
            ("requests_waiting", now.waiting, "Requests that wait for a slot"),
            ("tokens_per_pass", tokens_per_pass(now), "Tokens that a pass of the model brought; 1 without drafts"),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", meaning, value)
        pages = GaugeMetricFamily(f"{PREFIX}_cache_pages", "Pages of the latent cache", labels=["state"])
        for state in ("used", "free", "cached"):
            pages.add_metric([state], getattr(now, f"pages_{state}"))
        yield pages
        for name, value, meaning in (
            ("prompt_tokens", now.prompt_tokens, "Tokens of prompts, reused ones included"),
            ("reused_prompt_tokens", now.reused_tokens, "Tokens of prompts that were in the cache already"),
            ("generated_tokens", now.generated_tokens, "Tokens generated"),
            ("passes", now.passes, "Passes of the model over a request's newest token and its drafts"),
        ):
            yield CounterMetricFamily(f"{PREFIX}_{name}", meaning, value)
        accepted = CounterMetricFamily(f"{PREFIX}_accepted_drafts", "Drafts that stayed, by depth", labels=["depth"])
        share = GaugeMetricFamily(f"{PREFIX}_draft_acceptance", "Share of passes in which it stayed", labels=["depth"])
        for depth, (count, part) in enumerate(zip(now.accepted, acceptance(now), strict=True), start=1):
            accepted.add_metric([str(depth)], count)
            share.add_metric([str(depth)], part)
        yield accepted
        yield share


def tokens_per_pass(statistics: Statistics) -> float:
    """A pass brings one token and the drafts that stay. 1 before the first pass."""
    return 1 + sum(statistics.accepted) / max(statistics.passes, 1)


def acceptance(statistics: Statistics) -> list[float]:
    """Share of the passes in which draft 1, 2, ... stayed."""
    return [count / max(statistics.passes, 1) for count in statistics.accepted]
