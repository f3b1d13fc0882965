"""llama.cpp in this process, through the `xllamacpp` wheel: what it answers for given token ids."""

import json
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import xllamacpp

from .agreement import Distribution

CERTAIN = 1e4
"""A logit bias that decides any sampling. Reported log probabilities are those before it."""


class LlamaCpp:
    """One model in llama.cpp: F32 cache, no flash attention, nothing on a GPU.

    Everything is built on one question, the distribution after a prefix. The server keeps the
    cache of the longest prefix, so the next position costs the decoding of one token. The token
    that is sampled is always the same one, forced by a bias, because the server reports no log
    probabilities where it samples a part of a character. So no position is ever missing.

    One thread, because two that wait for each other at every operator are 10 to 50 times slower
    as soon as somebody else needs a core. Speed comes from asking about many sequences at once.
    """

    def __init__(self, model: Path, *, context: int = 256, slots: int = 1, best: int = 10) -> None:
        """Loads `model`. Sequences of up to `context` tokens are decoded `slots` at a time.

        Raises RuntimeError where llama.cpp refuses the file.
        """
        self.best = best
        self._server: Any = xllamacpp.Server(_parameters(model, context, slots))
        self._probe = self._find_probe()

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server's loop and frees the model; both go with the last reference."""
        self._server = None

    def after(self, prefixes: Sequence[Sequence[int]]) -> list[Distribution]:
        """The best tokens after each prefix, all in one batch where there are slots enough."""
        return self._ask(prefixes, self._probe)

    def score(
        self, token_ids: Sequence[int], positions: Iterable[int] | None = None
    ) -> list[Distribution]:
        """Tokens forced: entry i is the distribution after `token_ids[: positions[i] + 1]`.

        All positions where none are given.
        """
        chosen = range(len(token_ids)) if positions is None else positions
        return [self.after([token_ids[: position + 1]])[0] for position in chosen]

    def score_all(self, sequences: Sequence[Sequence[int]]) -> list[list[Distribution]]:
        """`score` of each sequence; they advance side by side, a token each at a time."""
        answers: list[list[Distribution]] = [[] for _ in sequences]
        for length in range(1, max(map(len, sequences)) + 1):
            running = [i for i, sequence in enumerate(sequences) if len(sequence) >= length]
            found = self.after([sequences[i][:length] for i in running])
            for i, distribution in zip(running, found, strict=True):
                answers[i].append(distribution)
        return answers

    def greedy(
        self, prompt: Sequence[int], count: int, *, stop: Iterable[int] = ()
    ) -> tuple[list[int], list[Distribution]]:
        """At most `count` best tokens after `prompt`, and the distribution each came from.

        A token of `stop` ends the answer and is its last.
        """
        tokens: list[int] = []
        distributions: list[Distribution] = []
        ends = frozenset(stop)
        while len(tokens) < count and not (tokens and tokens[-1] in ends):
            distributions += self.after([[*prompt, *tokens]])
            tokens.append(next(iter(distributions[-1])))
        return tokens, distributions

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, special tokens recognised, none added (asked over local HTTP)."""
        request = Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps({"content": text, "parse_special": True, "add_special": False}).encode(),
            {"Content-Type": "application/json"},
        )
        # Without the environment's proxies: the address is this machine's.
        with build_opener(ProxyHandler({})).open(request, timeout=60) as response:
            tokens: list[int] = json.load(response)["tokens"]
        return tokens

    def _find_probe(self) -> int:
        """The first token id for which llama.cpp reports log probabilities when it samples it."""
        for candidate in range(1000):
            if self._ask([[0]], candidate)[0]:
                return candidate
        raise RuntimeError("llama.cpp reports log probabilities for none of the first 1000 tokens")

    def _ask(self, prefixes: Sequence[Sequence[int]], sampled: int) -> list[Distribution]:
        answer = self._server.handle_completions(
            {
                "prompt": [list(prefix) for prefix in prefixes],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": self.best,
                "logit_bias": [[sampled, CERTAIN]],
                "cache_prompt": True,
            }
        )
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp: {answer}")
        return [
            _distribution(choice) for choice in sorted(answer["choices"], key=itemgetter("index"))
        ]


def _distribution(choice: dict[str, Any]) -> Distribution:
    """That of the one sampled token; empty where the server reports none."""
    content = (choice.get("logprobs") or {}).get("content") or [{"top_logprobs": []}]
    return {entry["id"]: entry["logprob"] for entry in content[0]["top_logprobs"]}


def _parameters(model: Path, context: int, slots: int) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx = context * slots
    parameters.n_parallel = slots
    parameters.n_gpu_layers = 0
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    for pool in (parameters.cpuparams, parameters.cpuparams_batch):
        pool.n_threads = 1
    parameters.cache_ram_mib = 0  # its store of old prompts; the slots' own caches are enough
    parameters.fit_params = False  # else it may shrink the context to what it finds free
    parameters.warmup = False
    parameters.verbosity = 0
    return parameters
