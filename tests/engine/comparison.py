"""What two runs, or a run and the oracle, must have in common."""

from collections.abc import Mapping, Sequence

from raygraft import LLM, Completion, SamplingParams

CLOSE = 0.02
"""Two tokens whose log probabilities are as close may change places on a GPU, no others may."""


def answer(llm: LLM, cases: Sequence[Mapping]) -> list[Completion]:
    """Greedy answers to oracle cases, all in one batch, with ten log probabilities each."""
    longest = max(len(case["tokens"]) for case in cases)
    params = SamplingParams(temperature=0, max_tokens=longest, logprobs=10)
    answers = llm.generate([case["prompt_tokens"] for case in cases], params)
    return [_cut(a, len(case["tokens"])) for a, case in zip(answers, cases, strict=True)]


def _cut(completion: Completion, length: int) -> Completion:
    """The answer as it would be with a lower limit: a case may be shorter than the longest."""
    assert completion.logprobs is not None
    return Completion(
        completion.text,
        completion.token_ids[:length],
        completion.prompt_token_ids,
        completion.logprobs[:length],
        completion.finish_reason,
    )


def largest_difference(
    ours: Sequence[Mapping[int, float]], theirs: Sequence[Mapping[int, float]]
) -> float:
    """Largest difference of a log probability that both list.

    Ids at the end of two lists may differ; then both must lie close to the other list's last.
    """
    assert len(ours) == len(theirs)
    worst = 0.0
    for mine, yours in zip(ours, theirs, strict=True):
        for token in mine.keys() | yours.keys():
            left = mine.get(token, min(mine.values()))
            right = yours.get(token, min(yours.values()))
            worst = max(worst, abs(left - right))
    return worst


def differences(
    ours: Completion, tokens: Sequence[int], logprobs: Sequence[Mapping[int, float]]
) -> list[float]:
    """Of an answer's log probabilities, up to where two best ones of the others are close."""
    assert ours.logprobs is not None
    found = []
    for position, (token, theirs) in enumerate(zip(tokens, logprobs, strict=True)):
        mine = ours.logprobs[position]
        found += [abs(mine[t] - value) for t, value in theirs.items() if t in mine]
        best = sorted(theirs.values(), reverse=True)
        if ours.token_ids[position] != token:
            assert best[0] - best[1] < CLOSE, f"position {position}"
            break
    return found
