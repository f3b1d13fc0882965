"""Prefix sharing: what one request has computed, the next does not compute again."""

from engine.engines import ATTENTION_AND_FFN, GREEDY, alone, engine

from raygraft import LLM, SamplingParams

SIZE = 16
SHARED = list(range(1, 60))


def rows(one):
    return sum(step.rows for step in one.steps())


def test_a_shared_beginning_is_computed_once(tiny_model):
    prompts = [[*SHARED, 100 + n] for n in range(4)]
    expected = alone(tiny_model, prompts, GREEDY)
    with engine(tiny_model) as one:
        answers = []
        for number, prompt in enumerate(prompts):
            before = rows(one)
            sequence = one.add(prompt, GREEDY)
            answers += one.finish([sequence])
            reused = 0 if number == 0 else len(SHARED) // SIZE * SIZE
            assert sequence.cached == reused
            assert rows(one) - before == len(prompt) - reused + GREEDY.max_tokens - 1
    assert answers == expected


def test_shared_while_the_first_is_still_computed(tiny_model):
    """Also across half-batches: a later step finds what an earlier one has written."""
    prompts = [[*SHARED, *range(100, 140), n] for n in range(4)]
    with engine(tiny_model, place=ATTENTION_AND_FFN, half_batches=2) as one:
        first = one.add(prompts[0], GREEDY)
        list(one.rounds.send(one.scheduler))
        others = [one.add(prompt, GREEDY) for prompt in prompts[1:]]
        answers = one.finish([first, *others])
        assert [sequence.cached for sequence in others] == [
            64
        ] * 3  # in flight since the first step
    assert answers == alone(tiny_model, prompts, GREEDY)


def test_the_same_prompt_computes_its_last_token_again(tiny_model):
    prompt = list(range(1, 2 * SIZE + 1))
    with engine(tiny_model) as one:
        one.finish([one.add(prompt, GREEDY)])
        again = one.add(prompt, GREEDY)
        answers = one.finish([again])
        assert again.cached == SIZE
    assert answers == alone(tiny_model, [prompt], GREEDY)


def test_scores_are_computed_at_every_position(tiny_model):
    with engine(tiny_model) as one:
        one.finish([one.add(SHARED, GREEDY)])
        scored = one.add(SHARED, GREEDY, scoring=True)
        one.finish([scored])
        assert scored.cached == 0
        assert len(scored.tokens) == len(SHARED)


def test_what_is_needed_elsewhere_is_forgotten(tiny_model):
    with engine(tiny_model, blocks=9) as one:
        one.finish([one.add(SHARED, GREEDY)])
        one.finish([one.add(list(range(200, 300)), GREEDY)])  # takes eight of the nine pages
        again = one.add(SHARED, GREEDY)
        answers = one.finish([again])
        assert again.cached < len(SHARED) // SIZE * SIZE
    assert answers == alone(tiny_model, [SHARED], GREEDY)


def test_the_second_turn_of_a_chat_computes_only_what_is_new(tiny_model):
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    devices = ["a:backend=reference,threads=1"]
    question = {"role": "user", "content": "who is the cat in the house?"}
    then = {"role": "user", "content": "and then?"}
    with LLM(tiny_model, devices=devices, runtime="in-process", ctx_size=256) as llm:
        first = llm.chat([question], params)
        said = llm.tokenizer.decode(first.token_ids)
        turns = [question, {"role": "assistant", "content": said}, then]
        before = llm.engine_thread.engine.timings.prefill_tokens
        second = llm.chat(turns, params)
        computed = llm.engine_thread.engine.timings.prefill_tokens - before
    ids = second.prompt_token_ids
    seen = first.prompt_token_ids + first.token_ids[:-1]
    common = next((n for n, (a, b) in enumerate(zip(ids, seen, strict=False)) if a != b), len(seen))
    assert common > len(first.prompt_token_ids)
    assert second.cached_tokens == common // SIZE * SIZE
    assert computed == len(ids) - second.cached_tokens
    with LLM(tiny_model, devices=devices, runtime="in-process", ctx_size=256) as llm:
        assert llm.chat(turns, params).token_ids == second.token_ids
