"""Several sequences in one batch give each the tokens that it gets alone."""

from dataclasses import replace

from raygraft import LLM, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=16)


def test_eight_sequences_of_the_demo_model(demo_model, oracle_cases):
    """To the last bit of every log probability: alone, together, and in chunks of other sizes."""
    prompts = [case["prompt_tokens"] for case in oracle_cases if case["name"] != "long"][:8]
    params = replace(PARAMS, logprobs=5)
    with LLM(demo_model, runtime="in-process") as llm:
        together = llm.generate(prompts, params)
        alone = [llm.generate(prompt, params)[0] for prompt in prompts]
    with LLM(demo_model, runtime="in-process", max_sequences=3, max_rows=19) as llm:
        chunked = llm.generate(prompts, params)
    for others in (alone, chunked):
        assert [c.token_ids for c in others] == [c.token_ids for c in together]
        assert [c.logprobs for c in others] == [c.logprobs for c in together]


def test_seeded_draws_do_not_depend_on_the_batch(tiny_model):
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8], [9, 10], [11, 12, 13], [14], [15, 16], [17]]
    params = SamplingParams(temperature=1.2, top_k=30, seed=7, max_tokens=24, ignore_eos=True)
    with LLM(tiny_model, runtime="in-process") as llm:
        together = llm.generate(prompts, params)
        alone = [llm.generate(prompt, params)[0] for prompt in reversed(prompts)][::-1]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({tuple(c.token_ids) for c in together}) == len(prompts)


def test_prompts_in_chunks_and_requests_beyond_the_batch(tiny_model):
    prompts = [list(range(1, 60)), [3, 4], list(range(5, 45)), [6], [7, 8, 9]]
    with LLM(tiny_model, runtime="in-process", max_sequences=2, max_rows=8) as llm:
        chunked = llm.generate(prompts, PARAMS)
    with LLM(tiny_model, runtime="in-process") as llm:
        whole = llm.generate(prompts, PARAMS)
    assert [c.token_ids for c in chunked] == [c.token_ids for c in whole]
    assert [c.finish_reason for c in chunked] == [c.finish_reason for c in whole]
