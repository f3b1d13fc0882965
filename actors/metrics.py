"""What an engine is doing, as Ray metrics: gathered once a second, beside the steps.

| metric | kind | tags |
|---|---|---|
| `raygraft_prompt_tokens`, `raygraft_generated_tokens` | counter | engine |
| `raygraft_recoveries`, `raygraft_moves`, `raygraft_sequences_set_aside` | counter | engine |
| `raygraft_requests_running`, `raygraft_requests_waiting`, `raygraft_pages_used` | gauge | engine |
| `raygraft_epoch` | gauge | engine |
| `raygraft_step_rows`, `raygraft_step_seconds` | histogram | engine |
| `raygraft_device_run_seconds`, `raygraft_device_wait_seconds` | counter | engine, device |
| `raygraft_device_records_sent`, `raygraft_device_bytes_sent` | counter | engine, device |

Ray exports them in Prometheus' form, at the metrics port of each node.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ray.util.metrics import Counter, Gauge, Histogram

from raygraft.actors.engine import Engine
from raygraft.graph.errors import RaygraftError

PERIOD_SECONDS = 1.0
DEVICE_PERIODS = 5
"""Devices are asked each so many periods: that takes a call to each."""
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]


class EngineMetrics:
    """A thread that looks at an engine, and tells Ray what has changed."""

    def __init__(
        self, engine: Engine, name: str, recoveries: Callable[[], int], moves: Callable[[], int]
    ) -> None:
        """`recoveries` and `moves` say how many there were so far."""
        self._engine = engine
        self._more = {"recoveries": recoveries, "moves": moves}
        self._tags = {"engine": name}
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._totals: dict[tuple[str, str], float] = {}
        self._rows = Histogram("raygraft_step_rows", "Rows of a step", ROWS, ("engine",))
        self._seconds = Histogram("raygraft_step_seconds", "Of a step", SECONDS, ("engine",))
        self._gathering = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raygraft metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self._thread.join(2 * PERIOD_SECONDS)

    def _run(self) -> None:
        periods = 0
        while not self._closed.wait(PERIOD_SECONDS):
            self.gather()
            periods += 1
            if periods % DEVICE_PERIODS == 0 and self._engine.failure is None:
                self._gather_devices()

    def gather(self) -> None:
        """Tell Ray what the engine has done since the last time."""
        with self._gathering:
            self._gather_engine()

    def _gather_engine(self) -> None:
        engine, timings = self._engine, self._engine.timings
        scheduler = engine.scheduler
        self._count("prompt_tokens", timings.prefill_tokens)
        self._count("generated_tokens", timings.generated_tokens)
        self._count("sequences_set_aside", scheduler.set_aside)
        for name, total in self._more.items():
            self._count(name, total())
        self._set("requests_running", len(scheduler.running))
        self._set("requests_waiting", len(scheduler.waiting))
        self._set("pages_used", scheduler.pages.blocks - scheduler.pages.free)
        self._set("epoch", engine.epoch)
        steps = timings.latest_steps
        while steps:
            rows, seconds = steps.popleft()
            self._rows.observe(rows, self._tags)
            self._seconds.observe(seconds, self._tags)

    def _gather_devices(self) -> None:
        try:
            counters = self._engine.fleet.counters()
        except RaygraftError:
            return  # the engine will notice
        for device, own in counters.items():
            self._count("device_run_seconds", own.run_seconds, device)
            self._count("device_wait_seconds", own.wait_seconds, device)
            self._count("device_records_sent", own.records_sent, device)
            self._count("device_bytes_sent", own.bytes_sent, device)

    def _count(self, name: str, total: float, device: str = "") -> None:
        keys = ("engine", "device") if device else ("engine",)
        if name not in self._counters:
            self._counters[name] = Counter(f"raygraft_{name}", tag_keys=keys)
        before = self._totals.get((name, device), 0.0)
        more = total - before if total >= before else total  # a device that was started anew
        self._totals[name, device] = total
        if more > 0:
            tags = {**self._tags, "device": device} if device else self._tags
            self._counters[name].inc(more, tags)

    def _set(self, name: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"raygraft_{name}", tag_keys=("engine",))
        self._gauges[name].set(value, self._tags)
