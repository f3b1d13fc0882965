"""Backends of somebody else's: claims, limits, patterns, and where they come from."""

import os
import signal
import sys
from pathlib import Path

import pytest
import ray
from engine.comparison import answer

from raygraft import LLM, SamplingParams
from raygraft.graph.capability import YES, Pattern, no
from raygraft.graph.errors import ConfigurationError, PlanError
from raygraft.kernels import BackendOptions, create_backend, known_backends
from raygraft.kernels.base import Backend
from raygraft.kernels.reference.backend import ReferenceBackend

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = f"{ROOT / 'examples' / 'attention_only.py'}:AttentionOnly"
BOARD = f"{ROOT / 'examples' / 'simulated_accelerator.py'}:SmallBoard"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

NARROW = """
import importlib.util
spec = importlib.util.spec_from_file_location("attention_only", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

class Narrow(module.AttentionOnly):
    widest_head = 8
"""


def device(name: str, backend: str) -> dict[str, object]:
    return {"name": name, "backend": backend, "threads": 1}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """The example with a head-size limit below every model's."""
    path = tmp_path_factory.mktemp("narrow") / "narrow.py"
    path.write_text(NARROW.format(path=EXAMPLE.rpartition(":")[0]))
    return f"{path}:Narrow"


def test_the_example_is_short():
    path = Path(EXAMPLE.rpartition(":")[0])
    assert len(path.read_text().splitlines()) < 80


@pytest.mark.ray
def test_every_attention_block_on_the_attention_only_device(demo_model, oracle_cases, ray_cluster):
    cases = [case for case in oracle_cases if case["name"] in ("capital", "unicode")]
    devices = [device("board", EXAMPLE), device("cpu", "cpu")]
    with LLM(demo_model, devices=devices, verify=True) as llm:
        completions = answer(llm, cases)
        device_of, claims = llm.plan.device_of, {p.claim for p in llm.plan.placements}
    attention = {name for name in device_of if ".attn." in name}
    assert {name for name, where in device_of.items() if where == "board"} == attention
    assert claims >= {f"blk.{n}.attn" for n in range(30)}
    assert [c.token_ids for c in completions] == [case["tokens"] for case in cases]


def test_beyond_its_limit_regions_go_elsewhere(tiny_model, narrow):
    devices = [device("board", narrow), device("cpu", "cpu")]
    with LLM(tiny_model, devices=devices, runtime="in-process") as llm:
        assert set(llm.plan.device_of.values()) == {"cpu"}
        assert llm.generate([1, 2], GREEDY)[0].finish_reason == "length"


def test_beyond_its_limit_a_rule_is_refused(tiny_model, narrow):
    devices = [device("board", narrow), device("cpu", "cpu")]
    with pytest.raises(PlanError, match=r"heads are at most 8 wide, not 16"):
        LLM(tiny_model, devices=devices, place={"kind:attention": "board"}, runtime="in-process")


def test_the_simulated_board_takes_what_fits(demo_model):
    devices = [device("board", BOARD), device("cpu", "cpu")]
    with LLM(demo_model, devices=devices, runtime="in-process", ctx_size=4096) as llm:
        blocks = {r.split(".")[1] for r, where in llm.plan.device_of.items() if where == "board"}
        board = next(use for use in llm.plan.devices if use.device == "board")
    assert 0 < len(blocks) < 30
    assert board.weights + board.cache + board.workspace <= board.memory


def test_the_simulated_board_refuses_wide_weights(tiny_model):
    devices = [device("board", BOARD), device("cpu", "cpu")]
    with pytest.raises(PlanError, match=r"its weights have 4 bits, not F32"):
        LLM(tiny_model, devices=devices, place={"blk.0.attn": "board"}, runtime="in-process")


FUSED = """
from raygraft.graph.capability import YES, Pattern, no
from raygraft.kernels.reference.backend import ReferenceBackend

class Fused(ReferenceBackend):
    def supports_op(self, signature, limits):
        return no("it has fused kernels only")

    def patterns(self):
        return [Pattern("fused_gate", ("rms_norm", "matmul", "matmul", "swiglu"))]

    def claims(self, region, limits):
        return YES if region.kind == "fused_gate" else no("no such kernel")

    def load(self, subgraph, weights, limits):
        assert subgraph.claim == "fused_gate"
        return super().load(subgraph, weights, limits)
"""


def test_a_pattern_becomes_a_region_that_is_claimed(tiny_model, tmp_path):
    (tmp_path / "fused.py").write_text(FUSED)
    devices = [device("board", f"{tmp_path / 'fused.py'}:Fused"), device("cpu", "cpu")]
    place = {"kind:fused_gate": "board"}
    with LLM(tiny_model, devices=devices, place=place, runtime="in-process") as llm:
        claimed = [p for p in llm.plan.placements if p.device == "board"]
        cut = llm.generate([1, 2, 3], GREEDY)
    assert [p.region for p in claimed] == ["blk.0.ffn.gate_up", "blk.1.ffn.gate_up"]
    assert all(p.claim and p.claim.endswith("fused_gate") for p in claimed)
    with LLM(tiny_model, runtime="in-process") as llm:
        assert [c.token_ids for c in llm.generate([1, 2, 3], GREEDY)] == [c.token_ids for c in cut]


def test_a_region_of_ones_own_that_cuts_across_the_tree(tiny_model):
    regions = {"tail": "blk.1+head"}
    devices = [device("a", "cpu"), device("b", "cpu")]
    place = {"*": "a", "tail": "b"}
    with LLM(
        tiny_model, devices=devices, regions=regions, place=place, runtime="in-process"
    ) as llm:
        device_of = llm.plan.device_of
        cut = llm.generate([1, 2, 3], GREEDY)
    on_b = {name for name, where in device_of.items() if where == "b"}
    assert on_b == {n for n in device_of if n.startswith("blk.1.")} | {"head"}
    with LLM(tiny_model, runtime="in-process") as llm:
        assert [c.token_ids for c in llm.generate([1, 2, 3], GREEDY)] == [c.token_ids for c in cut]


@pytest.mark.ray
def test_questions_are_asked_once_per_device_and_incarnation(tiny_model, ray_cluster):
    devices = [device("a", "cpu"), device("b", EXAMPLE)]
    with LLM(tiny_model, devices=devices, place={"kind:attention": "b"}) as llm:
        fleet = llm._fleet
        questions = fleet._answers["a"][1]
        assert {name: c.questions for name, c in fleet.counters().items()} == {"a": 1, "b": 1}
        before = [profile.verdicts for profile in fleet.profiles(questions)]
        assert {c.questions for c in fleet.counters().values()} == {1}
        os.kill(ray.get(fleet._actors["b"].pid.remote()), signal.SIGKILL)
        llm.generate([1, 2, 3], GREEDY)
        assert llm.engine_thread.recovery.count == 1
        assert [profile.verdicts for profile in fleet.profiles(questions)] == before
        assert {name: c.questions for name, c in fleet.counters().items()} == {"a": 1, "b": 1}


def test_an_entry_point_is_found(tmp_path, monkeypatch):
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[raygraft.backends]\nmine = mine_backend:Mine\n")
    source = "from raygraft.kernels.reference.backend import ReferenceBackend as Mine\n"
    (tmp_path / "mine_backend.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert "mine" in known_backends()
    assert isinstance(create_backend("mine", BackendOptions()), ReferenceBackend)
    sys.modules.pop("mine_backend")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, "Mine", "no such file on this machine"),
        ("x = 1", "Mine", "it has no class Mine"),
        ("import nothing_like_this", "Mine", "cannot be imported: ModuleNotFoundError"),
        ("Mine = 3", "Mine", "is no subclass of"),
    ],
)
def test_what_is_wrong_with_a_file(source, name, message, tmp_path):
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigurationError, match=message):
        create_backend(f"{path}:{name}", BackendOptions())


def test_an_unknown_name_lists_the_known(tiny_model):
    with pytest.raises(
        ConfigurationError, match=r"'gpu9' is not known; known are cpu, cuda, reference"
    ):
        LLM(tiny_model, devices=["a:backend=gpu9"])


def test_the_seam_says_no_by_default():
    class Silent(Backend):
        describe = load = None

    silent = Silent(BackendOptions())
    assert not silent.supports_op(None, None)
    assert not silent.claims(None, None)
    assert (YES, no("why").reason, Pattern("k", ()).operators) == (YES, "why", ())
