"""How fast an engine was since it was loaded, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass

from raygraft.actors.engine import Engine


@dataclass(frozen=True, slots=True)
class Timings:
    """Measured since the model was loaded."""

    load_s: float
    prefill_tps: float
    decode_tps: float
    hops_per_token: int
    """Records per decode step: between devices, and to the engine."""
    bytes_per_hop: float
    """Mean payload of a record with one row."""
    hop_us: float
    """Time of a step outside of all stages, per hop: links, waiting and the engine's own work."""
    device_busy: dict[str, float]
    """Device -> share of the stepping time that it computed."""
    cached_tokens: int
    """Of all prompts: what the cache held already."""
    half_batches: int
    """Steps that shared the devices with another one in flight."""


def timings_of(engine: Engine, load_seconds: float) -> Timings:
    """What an engine and its devices have counted, as speeds and shares."""
    t, hops = engine.timings, engine.plan.hops
    counters = engine.fleet.counters()
    total = t.prefill_seconds + t.decode_seconds
    steps = max((c.steps for c in counters.values()), default=0)
    outside = total - sum(c.run_seconds for c in counters.values())
    return Timings(
        load_s=load_seconds,
        prefill_tps=_rate(t.prefill_tokens, t.prefill_seconds),
        decode_tps=_rate(t.decode_tokens, t.decode_seconds),
        hops_per_token=hops,
        bytes_per_hop=sum(transfer.row_bytes for transfer in engine.plan.records) / hops,
        hop_us=max(0.0, 1e6 * _rate(outside, steps * hops)),
        device_busy={name: _rate(c.run_seconds, total) for name, c in counters.items()},
        cached_tokens=engine.scheduler.cached_tokens,
        half_batches=t.half_batches,
    )


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
