"""The same tokens and log probabilities, however the model is cut across Ray actors."""

import pytest
from engine.comparison import answer, largest_difference

from raygraft import LLM

CASES = ("capital", "unicode", "dialog", "long")
DEALT = {f"blk.[{','.join(str(n) for n in range(i, 30, 4))}]": d for i, d in enumerate("abcd")}
CUTS = {
    "attention and feed-forward": {"kind:attention": "a", "kind:ffn": "b"},
    "halves of the layers": {"*": "a", "blk.[15-29]": "b", "head": "b", "sample": "b"},
    "qkv, core and out": {"*": "a", "kind:qkv": "a", "kind:core": "b", "kind:out": "c"},
    "blocks dealt out to four": {"*": "a", **DEALT},
    "the head alone": {"*": "a", "head": "b", "sample": "a"},
}

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cases(oracle_cases):
    return [case for case in oracle_cases if case["name"] in CASES]


@pytest.fixture(scope="module")
def uncut(demo_model, cases):
    with LLM(demo_model, devices=["a:threads=1"], runtime="in-process") as llm:
        return answer(llm, cases)


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_changes_nothing(name, demo_model, cases, uncut, ray_cluster):
    place = CUTS[name]
    devices = [f"{device}:threads=1" for device in dict.fromkeys(place.values())]
    with LLM(demo_model, devices=devices, place=place, half_batches=1) as llm:
        used = {stage.device for stage in llm.plan.stages}
        completions = answer(llm, cases)
        timings = llm.timings()
    assert used == set(place.values())
    assert timings.hops_per_token == llm.plan.hops > 0
    for case, ours, theirs in zip(cases, completions, uncut, strict=True):
        assert ours.token_ids == case["tokens"], case["name"]
        assert largest_difference(ours.logprobs, theirs.logprobs) <= 1e-5, case["name"]
