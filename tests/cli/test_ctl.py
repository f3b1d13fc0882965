"""`raygraft ctl` against an engine of the same cluster."""

import pytest

from raygraft import LLM, SamplingParams
from raygraft.control import ask_engine
from raygraft.graph.errors import ClusterError, ConfigurationError, PlanError

pytestmark = pytest.mark.ray

DEVICES = [
    {"name": "a", "backend": "reference", "threads": 1},
    {"name": "b", "backend": "reference", "threads": 1, "regions": "ffn"},
]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def test_what_is_asked_is_done(tiny_model, ray_cluster):
    place = {"*": "a", "kind:ffn": "b"}
    with LLM(tiny_model, devices=DEVICES, place=place, name="tried") as llm:
        before = llm.generate([[3, 1, 4]], GREEDY)[0].token_ids
        assert set(ask_engine("tried", ["status"])["regions_of"]) == {"a", "b"}
        said = ask_engine("tried", ["move", "blk.0.ffn", "a"])
        assert said["regions"] > 0
        assert said["pause_seconds"] > 0
        assert ask_engine("tried", ["drain", "b"])["regions"] > 0
        assert set(ask_engine("tried", ["status"])["regions_of"]) == {"a"}
        ask_engine("tried", ["add", "b:backend=reference,threads=1,regions=ffn"])
        assert set(ask_engine("tried", ["status"])["regions_of"]) == {"a", "b"}
        with pytest.raises(PlanError):
            ask_engine("tried", ["move", "blk.0.attn", "b"])
        with pytest.raises(ConfigurationError, match="named 'tried' on this cluster already"):
            LLM(tiny_model, devices=DEVICES, place=place, name="tried")
        assert llm.generate([[3, 1, 4]], GREEDY)[0].token_ids == before
    with pytest.raises(ClusterError, match="no engine named 'tried'"):
        ask_engine("tried", ["status"])


def test_metrics_have_names_that_ray_takes(tiny_model, ray_cluster, monkeypatch):
    from raygraft.actors import metrics

    made = {}

    class Counted:
        def __init__(self, name, *_, **__):
            made[name] = self
            self.total = 0.0

        def inc(self, value, tags):
            self.total += value

        def observe(self, value, tags):
            self.total += 1

        def set(self, value, tags):
            self.total = value

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Counted)
    with LLM(tiny_model, devices=DEVICES, name="measured") as llm:
        llm.generate([[3, 1, 4], [1, 5]], GREEDY)
        llm._metrics.gather()
        llm._metrics._gather_devices()
        assert made["raygraft_prompt_tokens"].total == 5
        assert made["raygraft_generated_tokens"].total == 40
        assert made["raygraft_step_rows"].total >= 20
        assert made["raygraft_requests_running"].total == 0
        assert made["raygraft_device_run_seconds"].total > 0
