"""What `/metrics` tells: counts and times of requests, and what the engine says of itself."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runner.server.engine_thread import EngineThread
from runner.server.records import RequestRecord

_LATENCY = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
_BETWEEN_TOKENS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Counts on the event loop's thread; of the engine it reads numbers alone, when asked."""

    def __init__(self, engine: EngineThread) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineNumbers(engine))
        self._requests = Counter(
            "runner_requests",
            "Requests answered.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._errors = Counter(
            "runner_errors", "Requests that ended in an error.", ("code",), registry=self._registry
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts admitted.")
        self._completion_tokens = self._counter("completion_tokens", "Tokens sampled.")
        self._latency = Histogram(
            "runner_request_latency_seconds",
            "From a request to the end of its answer.",
            ("route",),
            buckets=_LATENCY,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "runner_time_to_first_token_seconds",
            "From a request to the first piece of a streamed answer.",
            buckets=_FIRST_TOKEN,
            registry=self._registry,
        )
        self._between_tokens = Histogram(
            "runner_inter_token_latency_seconds",
            "Between two tokens of one sample in a streamed answer.",
            buckets=_BETWEEN_TOKENS,
            registry=self._registry,
        )

    def count(self, record: RequestRecord, route: str) -> None:
        """Counts a request that is done; `route` is its path as the program declares it."""
        self._requests.labels(record.method, route, str(record.status)).inc()
        if record.error is not None:
            self._errors.labels(record.error).inc()
        self._prompt_tokens.inc(record.num_prompt_tokens)
        self._completion_tokens.inc(record.num_completion_tokens)
        self._latency.labels(route).observe(record.seconds)
        if record.first_token is not None:
            self._first_token.observe(record.first_token)

    def gap(self, seconds: float, num_tokens: int) -> None:
        """Counts the time between two pieces of a sample, evenly for the tokens of the second."""
        for _ in range(num_tokens):
            self._between_tokens.observe(seconds / num_tokens)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"runner_{name}", what, registry=self._registry)


class _EngineNumbers(Collector):
    """Reads the engine's counters: plain integers, whole at any moment, of any thread."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """What they are now. Those of the engine itself begin anew where it starts over."""
        thread, engine = self._engine, self._engine.llm.engine
        rows = engine.sequences
        running = len({row.request.request_id for row in rows})
        yield _gauge("engine_ready", "1 while the engine takes requests.", thread.status == "ready")
        restarts = thread.num_restarts
        yield _count("engine_restarts", "Times that the engine has failed.", restarts)
        waiting = max(0, thread.num_open - running)
        yield _gauge("requests_waiting", "Prompts that wait or are prefilled.", waiting)
        yield _gauge("requests_running", "Prompts with rows in the batch.", running)
        yield _gauge("batch_rows", "Rows of the batch in use.", len(rows))
        yield _gauge("batch_rows_max", "Rows of the batch.", engine.max_batch_size)
        stats = engine.stats
        cached = stats.num_cached_tokens
        yield _count("prefix_cache_hit_tokens", "Prompt tokens that were not forwarded.", cached)
        yield _count(
            "prefill_tokens", "Prompt tokens forwarded, pads too.", stats.num_prefill_tokens
        )
        drafts = engine.speculation and engine.speculation.stats
        drafted = sum(drafts.drafted_at) if drafts else 0
        accepted = sum(drafts.accepted_at) if drafts else 0
        yield _count("speculation_drafted_tokens", "Tokens drafted.", drafted)
        yield _count("speculation_accepted_tokens", "Drafted tokens that stood.", accepted)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"runner_{name}", what, value=value)


def _count(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"runner_{name}", what, value=value)
