"""Property: any assignment of regions to devices computes the same."""

from engine.comparison import largest_difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raygraft import LLM, SamplingParams
from raygraft.model import Model

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [20, 30, 40]]
PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=10, ignore_eos=True)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_cuts_compute_the_same(tiny_model, data):
    model = Model(tiny_model)
    with LLM(model, runtime="in-process") as llm:
        uncut = llm.generate(PROMPTS, PARAMS)
    devices = data.draw(st.sampled_from(["ab", "abc", "abcde"]), label="devices")
    leaves = [leaf.name for leaf in model.graph.leaves]
    place = {leaf: data.draw(st.sampled_from(devices), label=leaf) for leaf in leaves}
    one = {"runtime": "in-process", "half_batches": 1}  # batches of the same shape
    with LLM(model, devices=list(devices), place=place, **one) as llm:
        cut = llm.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in cut] == [c.token_ids for c in uncut]
    for ours, theirs in zip(cut, uncut, strict=True):
        assert largest_difference(ours.logprobs, theirs.logprobs) <= 1e-5
